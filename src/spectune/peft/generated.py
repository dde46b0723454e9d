"""The config of a method that has none of its own in `config.py`: VeRA's, AdaLoRA's, and those of plug-ins."""

from __future__ import annotations

import dataclasses
from typing import Any

from spectune.adapters.formats.dialect import option_of, type_for
from spectune.errors import SpectuneError
from spectune.methods import Method
from spectune.peft.config import SpectuneConfig, named

_PEFTS = {"lora": "peft.LoraConfig", "dora": "use_dora=True in any config"}


def config_for(method: type[Method]) -> type[SpectuneConfig]:
    """Return a new config class of a method: its fields, by PEFT's names where PEFT has one.

    Raises:
        SpectuneError: the method can have none.
    """
    if type_for(method) is None:
        why = "it is not listed among the methods, or has a field that is a method or that every config has"
        if method.name in _PEFTS:
            why = f"take {_PEFTS[method.name]}"
        raise SpectuneError(f"{method.__name__} has no config of spectune.peft: {why}")
    own, start = dataclasses.fields(method), method()
    members: list[tuple[str, Any, Any]] = [
        (option_of(f.name), f.type, dataclasses.field(default=getattr(start, f.name))) for f in own
    ]
    for name, values in (("rank", "int"), ("alpha", "float")):
        if any(f.name == name for f in own):
            members.append((f"{name}_pattern", f"dict[str, {values}] | None", dataclasses.field(default=None)))
    text = method.__doc__ or ""
    for f in own:
        text = text.replace(f"\n        {f.name}: ", f"\n        {option_of(f.name)}: ")
    members_of_class = {"__doc__": text, "__module__": __name__}
    bases = (SpectuneConfig,)
    made: Any = dataclasses.make_dataclass(f"{method.__name__}Config", members, bases=bases, namespace=members_of_class)
    return named(method.name)(made)

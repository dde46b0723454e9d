"""Which methods have a type of their own in PEFT's words, and what their tensors are called there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectune.methods import Method
from spectune.methods.dora import DoRA

PREFIX = "base_model.model."  # of every key that PEFT writes
TYPES = {"svf": "SVF", "svft": "SVFT", "milora": "MILORA", "pissa": "PISSA", "lora_xs": "LORAXS"}  # by method
_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}  # of a method's fields, where PEFT has one


def type_of(method: Method) -> str | None:
    """Return the PEFT type of a method, or None where it has none."""
    return TYPES.get((method.inner if isinstance(method, DoRA) else method).name)


def prefix_of(peft_type: str) -> str:
    """Return what the names of a type's tensors begin with; transformers asks for just this."""
    return f"{peft_type.lower()}_"


def option_of(field: str) -> str:
    """Return what PEFT calls a method's field."""
    return _NAMES.get(field, field)


def options_of(method: Method) -> dict[str, Any]:
    """Return a method's fields as options of its PEFT config."""
    inner = method.inner if isinstance(method, DoRA) else method
    fields = {option_of(key): value for key, value in inner.fields().items() if key != "name"}
    return {**fields, "use_dora": isinstance(method, DoRA)}


def fields_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a method, given the options of its PEFT config; the inverse of `options_of`."""
    given = {**options}
    around = given.pop("use_dora")
    back = {new: old for old, new in _NAMES.items()}
    inner = {"name": name, **{back.get(key, key): value for key, value in given.items()}}
    return {"name": "dora", "inner": inner} if around else inner

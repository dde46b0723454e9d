"""Which methods have a type of their own in PEFT's words, and what their tensors are called there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from spectune.methods import METHODS, Method
from spectune.methods.dora import DoRA

PREFIX = "base_model.model."  # of every key that PEFT writes
TYPES = {"svf": "SVF", "svft": "SVFT", "milora": "MILORA", "pissa": "PISSA", "lora_xs": "LORAXS"}  # by method
_PEFTS = ("lora", "dora")  # methods whose folders are PEFT's own
_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}  # of a method's fields, where PEFT has one
_TAKEN = {  # what every config says beside its method's fields
    *("peft_type", "task_type", "auto_mapping", "inference_mode", "revision", "peft_version", "runtime_config"),
    *("base_model_name_or_path", "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "bias"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "init_weights", "use_dora", "factored"),
    *("rank_pattern", "alpha_pattern", "library_name", "format_version", "error", "methods", "layers", "modules"),
}


def type_of(method: Method) -> str | None:
    """Return the PEFT type of a method, or None where it has none."""
    return type_for(type(method.inner if isinstance(method, DoRA) else method))


def type_for(method: type[Method]) -> str | None:
    """Return the PEFT type of a class of methods: its name, behind ours where PEFT has or may have one of that name.

    None where there is none: PEFT has the method itself, the method is one of single layers, or it has a field that is
    a method, has no default, or is called as something else in every config.
    """
    fields = dataclasses.fields(method)
    if METHODS.get(method.name) is not method or method.name in _PEFTS or {f.name for f in fields} & _TAKEN:
        return None
    if any(isinstance(_start(f), (Method, type(dataclasses.MISSING))) for f in fields):
        return None
    plain = "".join(c for c in method.name.upper() if c.isalnum())
    return TYPES.get(method.name, f"SPECTUNE{plain}")


def _start(field: dataclasses.Field[object]) -> object:
    """Return a field's default, or MISSING."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def prefix_of(peft_type: str) -> str:
    """Return what the names of a type's tensors begin with; transformers asks for just this."""
    return f"{peft_type.lower()}_"


def option_of(field: str) -> str:
    """Return what PEFT calls a method's field."""
    return _NAMES.get(field, field)


def options_of(method: Method) -> dict[str, object]:
    """Return a method's fields as options of its PEFT config."""
    inner = method.inner if isinstance(method, DoRA) else method
    fields = {option_of(key): value for key, value in inner.fields().items() if key != "name"}
    return {**fields, "use_dora": isinstance(method, DoRA)}


def fields_of(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Return the description of a method, given the options of its PEFT config; the inverse of `options_of`."""
    given = {**options}
    around = given.pop("use_dora")
    back = {new: old for old, new in _NAMES.items()}
    inner = {"name": name, **{back.get(key, key): value for key, value in given.items()}}
    return {"name": "dora", "inner": inner} if around else inner

"""The methods by name, and their text form `name:field=value,...`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from spectune.errors import SpectuneError, nearest
from spectune.methods.base import Method

METHODS: dict[str, type[Method]] = {}
_UNLISTED: dict[str, type[Method]] = {}  # of single layers, not to be chosen for a whole model
T = TypeVar("T", bound=type[Method])


@overload
def register(cls: T) -> T: ...
@overload
def register(*, listed: bool) -> Callable[[T], T]: ...
def register(cls: T | None = None, *, listed: bool = True) -> T | Callable[[T], T]:
    """Make a method known by its name to `adapt`, the command line and adapter files; listed, to `spectune methods`."""

    def known(cls: T) -> T:
        (METHODS if listed else _UNLISTED)[cls.name] = cls
        return cls

    return known if cls is None else known(cls)


def load_all() -> None:
    """Import every module of `spectune.methods`, so that a new file registers itself."""
    package = importlib.import_module("spectune.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"spectune.methods.{module.name}")


def find(name: str) -> type[Method]:
    """Return the method class of this name (`lora_xs`, `lora-xs` and `LoRAXS` are one).

    Raises:
        SpectuneError: there is none.
    """
    plain = {key.replace("_", ""): cls for key, cls in {**METHODS, **_UNLISTED}.items()}
    cls = plain.get(name.lower().replace("_", "").replace("-", ""))
    if cls is None:
        raise SpectuneError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    return cls


def parse(text: str | Method) -> Method:
    """Return the method that `name` or `name:field=value,...` describes.

    `dora:inner=pissa,rank=16` gives fields that DoRA has not to the inner method; without `inner` they change the
    method that is inside by default.

    Raises:
        SpectuneError: an unknown method or field, or a value that the field does not take.
    """
    if isinstance(text, Method):
        return text
    name, _, rest = text.strip().partition(":")
    values: dict[str, Any] = {}
    for pair in filter(None, (p.strip() for p in rest.split(","))):
        field, equals, value = pair.partition("=")
        if not equals:
            raise SpectuneError(f"{pair!r} in method {text!r} is not field=value")
        if (field := field.strip()) in values:
            raise SpectuneError(f"{field!r} is given twice in method {text!r}")
        values[field] = _literal(value.strip())
    return from_fields({"name": name, **values}, complete=False)


def from_fields(fields: Mapping[str, Any], *, complete: bool = True) -> Method:
    """Return the method of these fields, the inverse of `Method.fields`.

    Args:
        fields: `name` and the method's fields.
        complete: every field must be there, as in an adapter's file; otherwise defaults fill in.

    Raises:
        SpectuneError: a missing or unknown field (the nearest is named), or a wrong value.
    """
    if "name" not in fields:
        raise SpectuneError("the description of a method has no 'name'")
    cls = find(str(fields["name"]))
    known = {f.name for f in dataclasses.fields(cls)}
    given = {**(cls.earlier if complete else {}), **{k: v for k, v in fields.items() if k != "name"}}
    if "inner" in known and not complete:
        chosen = given.pop("inner", None)
        start = _default(cls, "inner").fields() if chosen is None else {"name": find(str(chosen)).name}
        theirs = {f.name for f in dataclasses.fields(find(start["name"]))} - known
        given["inner"] = start | {k: given.pop(k) for k in list(given) if k in theirs}
    for key in given.keys() - known:
        raise SpectuneError(f"{cls.name} has no field {key!r}{nearest(key, known)} (known: {', '.join(sorted(known))})")
    for key in known - given.keys() if complete else ():
        raise SpectuneError(f"the description of {cls.name} lacks the field {key!r}")
    if isinstance(given.get("inner"), Mapping):
        given["inner"] = from_fields(given["inner"], complete=complete)
    return cls(**given)


def to_text(method: Method) -> str:
    """Return the shortest `name:field=value,...` that `parse` reads back as `method`."""
    parts = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if value == _default(type(method), field.name):
            continue
        if isinstance(value, Method):
            inner_name, _, inner_rest = to_text(value).partition(":")
            parts += [f"inner={inner_name}", *filter(None, [inner_rest])]
        else:
            parts.append(f"{field.name}={value}")
    return f"{method.name}:{','.join(parts)}" if parts else method.name


def _default(cls: type[Method], field: str) -> Any:
    return getattr(cls(), field)


def _literal(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(lowered)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

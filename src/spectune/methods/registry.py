"""The methods by name, and their text form `name:field=value,...`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar, overload

from spectune.errors import SpectuneError, nearest
from spectune.methods.base import Method
from spectune.plugins import imported, load, offered

GROUP = "spectune.methods"  # of entry points: name = "package.module:Class", or a module that registers some
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


def load_plugins(failed: Callable[[SpectuneError], None] | None = None) -> dict[str, type[Method]]:
    """Return the listed methods by name, those that installed packages offer among them.

    Args:
        failed: called with what a package raises, which is raised where there is none.
    """
    for point in offered(GROUP).values():
        try:
            _known(load(point))
        except SpectuneError as error:
            if failed is None:
                raise
            failed(error)
    return METHODS


def find(name: str) -> type[Method]:
    """Return the method class of this name (`lora_xs`, `lora-xs` and `LoRAXS` are one), or of `module:Class`.

    Raises:
        SpectuneError: there is none.
    """
    cls = _registered(name)
    if cls is None and ":" in name:
        return _known(imported(name, "method", "Class, such as methods:Mine for a methods.py here"))
    if cls is None:  # packages are imported only for a name that is not known without them
        load_plugins()
        cls = _registered(name)
    if cls is None:
        raise SpectuneError(
            f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)}; one of a package of your "
            "own is known once its module is imported: module:Class on the command line, or an entry point of "
            f"{GROUP})"
        )
    return cls


def _registered(name: str) -> type[Method] | None:
    plain = {key.replace("_", ""): cls for key, cls in {**METHODS, **_UNLISTED}.items()}
    return plain.get(name.lower().replace("_", "").replace("-", ""))


def _known(found: object) -> type[Method]:
    """Return a method class that a package offers, registered."""
    if isinstance(found, type) and issubclass(found, Method):
        if _registered(found.name) is not found:
            if _registered(found.name) is not None:
                raise SpectuneError(f"{found!r} has the name {found.name!r}, which another method has; rename it")
            register(found)
        return found
    if isinstance(found, ModuleType):  # which has registered its methods as it was imported
        return Method
    raise SpectuneError(f"{found!r:.60} is not a subclass of spectune.Method")


def parse(text: str | Method) -> Method:
    """Return the method that `name` or `name:field=value,...` describes.

    `dora:inner=pissa,rank=16` gives fields that DoRA has not to the inner method; without `inner` they change the
    method that is inside by default.

    Raises:
        SpectuneError: an unknown method or field, or a value that the field does not take.
    """
    if isinstance(text, Method):
        return text
    name, rest = _taken_apart(text.strip())
    values: dict[str, object] = {}
    for pair in filter(None, (p.strip() for p in rest.split(","))):
        field, equals, value = pair.partition("=")
        if not equals:
            raise SpectuneError(f"{pair!r} in method {text!r} is not field=value")
        if (field := field.strip()) in values:
            raise SpectuneError(f"{field!r} is given twice in method {text!r}")
        values[field] = _literal(value.strip())
    return from_fields({"name": name, **values}, complete=False)


def _taken_apart(text: str) -> tuple[str, str]:
    """Return the method and the fields of `name:fields` or `module:Class:fields`."""
    name, _, rest = text.partition(":")
    second, _, fields = rest.partition(":")
    if second[:1].isupper() and second.isidentifier():
        return f"{name}:{second}", fields
    return name, rest


def from_fields(fields: Mapping[str, object], *, complete: bool = True) -> Method:
    """Return the method of these fields, the inverse of `Method.fields`.

    Args:
        fields: `name` and the method's fields.
        complete: every field must be there, as in an adapter's file; otherwise defaults fill in.

    Raises:
        SpectuneError: a missing or unknown field (the nearest is named), or a wrong value.
    """
    if "name" not in fields:
        raise SpectuneError("the description of a method has no 'name'")
    name = str(fields["name"])
    if complete and ":" in name:  # a file does not say what is imported
        raise SpectuneError(f"the description of a method names {name!r}; a method has a plain name")
    cls = find(name)
    known = {f.name for f in dataclasses.fields(cls)}
    given = {**(cls.earlier if complete else {}), **{k: v for k, v in fields.items() if k != "name"}}
    if "inner" in known and not complete:
        chosen = given.pop("inner", None)
        start = _default(cls, "inner").fields() if chosen is None else {"name": find(str(chosen)).name}
        theirs = {f.name for f in dataclasses.fields(find(str(start["name"])))} - known
        given["inner"] = start | {k: given.pop(k) for k in list(given) if k in theirs}
    for key in given.keys() - known:
        raise SpectuneError(f"{cls.name} has no field {key!r}{nearest(key, known)} (known: {', '.join(sorted(known))})")
    for key in known - given.keys() if complete else ():
        raise SpectuneError(f"the description of {cls.name} lacks the field {key!r}")
    if isinstance(inner := given.get("inner"), Mapping):
        given["inner"] = from_fields(inner, complete=complete)
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


def _literal(text: str) -> bool | int | float | str | None:
    lowered = text.lower()
    if lowered in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(lowered)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

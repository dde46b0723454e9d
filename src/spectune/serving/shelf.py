"""The adapters that a server has, by name; what a request's `model` means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError, nearest
from spectune.model.adapting import attach
from spectune.model.lifecycle import detach
from spectune.model.names import adapter_names
from spectune.model.routing import activate

BASE, AUTO = "base", "auto"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")


class UnknownAdapter(SpectuneError):
    """A name that no adapter has."""


class NameInUse(SpectuneError):
    """A name that an adapter has already."""


@dataclass(eq=False)
class Version:
    """An adapter as it was when it was loaded under a name; another one may have the name by now.

    Args:
        name: that it was loaded under.
        slot: its name on the model.
        path: where it came from.
        about: its methods, parameters and layers, for people.
    """

    name: str
    slot: str
    path: str
    about: dict[str, Any] = field(default_factory=dict)


Mixture = Mapping[Version, Any]  # a weight each, or one for each layer; none is the base


class Shelf:
    """Adapters on a model by the names that requests know them by.

    Looking up is for any thread; `put` and `remove` change the model and are for the one that runs it.

    Args:
        model: the base.
        base_names: names by which requests mean the base alone, beside "base".
        auto: whether a library chooses for requests that ask for "auto".
    """

    def __init__(self, model: Any, base_names: Iterable[str] = (), *, auto: bool = False) -> None:
        self.model, self.auto = model, auto
        self.base_names = (BASE, *base_names)
        self._versions: dict[str, Version] = {}
        self._on_model: set[Version] = set()
        self._numbers, self._lock = count(), Lock()

    @property
    def versions(self) -> list[Version]:
        """What can be asked for now."""
        with self._lock:
            return list(self._versions.values())

    def check_name(self, name: str) -> None:
        """Raise unless an adapter may have this name.

        Raises:
            SpectuneError: it may not.
        """
        if not _NAME.fullmatch(name) or name in (*self.base_names, AUTO):
            raise SpectuneError(
                f"{name[:80]!r} cannot be an adapter's name here; use letters, digits, '-', '_', '.' and '/', and no "
                f"name that means the base ({', '.join(self.base_names)}) or {AUTO!r}"
            )

    def put(self, name: str, adapter: Adapter, path: str | Path, *, replace: bool = False) -> Version:
        """Put an adapter on the model under a name.

        Raises:
            NameInUse: the name is taken, and `replace` is not said.
            SpectuneError: the adapter belongs to another base, or the name cannot be one.
        """
        self.check_name(name)
        if name in self._versions and not replace:
            raise NameInUse(f"an adapter {name!r} is loaded already; unload it first, or load it in its place")
        taken = set(adapter_names(self.model))
        slot = next(slot for i in self._numbers if (slot := f"served-{i}") not in taken)
        attach(self.model, adapter, slot)
        activate(self.model, None)
        version = Version(name, slot, str(path), _about(adapter))
        self._on_model.add(version)
        with self._lock:
            self._versions[name] = version
        return version

    def take(self, name: str) -> Version:
        """Let no new request have an adapter; those that run go on with it.

        Raises:
            UnknownAdapter: no adapter of that name is there.
        """
        with self._lock:
            if name not in self._versions:
                raise self._unknown(name)
            return self._versions.pop(name)

    def unused(self, in_use: Iterable[Version]) -> set[Version]:
        """Return what is on the model while no name stands for it any more and nothing uses it."""
        with self._lock:
            gone = self._on_model - set(self._versions.values())
        return gone - set(in_use) if gone else gone

    def remove(self, versions: Iterable[Version]) -> None:
        """Take versions off the model."""
        for version in versions:
            detach(self.model, version.slot)
            self._on_model.remove(version)

    def mixture(self, weights: Mapping[str, Any]) -> dict[Version, Any]:
        """Return what these names stand for now, with a weight each; a weight of zero is left out.

        Raises:
            UnknownAdapter: a name that no adapter has.
        """
        with self._lock:
            for name in weights:
                if name not in self._versions:
                    raise self._unknown(name)
            return {self._versions[name]: w for name, w in weights.items() if isinstance(w, Mapping) or w}

    def _unknown(self, name: str) -> UnknownAdapter:
        known = list(self._versions)
        there = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "") or "none"
        return UnknownAdapter(f"there is no adapter {name[:80]!r}{nearest(name, known)} (there: {there}; and {BASE!r})")

    def parse(self, model: str) -> dict[str, float] | None:
        """Return the names and weights that a request's `model` asks for; None is what a library chooses.

        `"pirate"`, `"pirate:0.7+chef:0.3"`, `"base"`, which has none, or `"auto"`.

        Raises:
            UnknownAdapter: a name that no adapter has.
            SpectuneError: another syntax, or weights that are no finite numbers.
        """
        if model in self.base_names:
            return {}
        with self._lock:
            known = dict(self._versions)
        if model in known:
            return {model: 1.0}
        if model == AUTO:
            if not self.auto:
                raise UnknownAdapter(f"no library is served that could choose for {AUTO!r}; start with --library")
            return None
        found: dict[str, float] = {}
        for part in model.split("+"):
            name, colon, weight = part.strip().partition(":")
            if name in found:
                raise SpectuneError(f"{name[:80]!r} is named twice in {model[:200]!r}; give it one weight")
            if name not in known and name not in self.base_names:
                raise self._unknown(name)
            found[name] = weight_of(name, weight) if colon else 1.0
        return {name: weight for name, weight in found.items() if name not in self.base_names}


def weight_of(name: str, value: Any) -> float:
    """Return an adapter's weight.

    Raises:
        SpectuneError: it is no finite number.
    """
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or abs(weight) > 1e6:
        raise SpectuneError(
            f"the weight of {name[:80]!r} must be a number such as 0.7, not {str(value)[:80]!r}; a mixture is written "
            "pirate:0.7+chef:0.3"
        )
    return weight


def _about(adapter: Adapter) -> dict[str, Any]:
    methods = dict.fromkeys(term.method.name for layer in adapter.layers.values() for term in layer.terms)
    return {
        "methods": list(methods),
        "parameters": adapter.parameter_count(),
        "layers": list(adapter.layers),
        "whole_modules": list(adapter.modules),
    }

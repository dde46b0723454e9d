"""The adapters that a server has, by name; what a request's `model` means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError, nearest
from spectune.methods import to_text
from spectune.model.adapting import prepare_attach
from spectune.model.lifecycle import detach
from spectune.model.names import adapter_names
from spectune.model.routing import activate
from spectune.spectral._hash import tensors_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE, AUTO = "base", "auto"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")


class Prepared(NamedTuple):
    """An adapter that is ready for a model.

    Args:
        slot: its name on the model.
        put: puts it there.
    """

    slot: str
    put: Callable[[], None]


class UnknownAdapter(SpectuneError):
    """A name that no adapter has."""


class NameInUse(SpectuneError):
    """A name that an adapter has already."""


class Unreadable(SpectuneError):
    """An adapter that was set aside and cannot be had again."""


@dataclass(eq=False)
class Version:
    """An adapter as it was when it was loaded under a name; another one may have the name by now.

    Args:
        name: that it was loaded under.
        path: where it came from.
        read: reads it again; None where nothing can, and it stays on the model.
        about: its methods, parameters and layers, for people.
        digest: of what it holds, by which it is known again.

    Attributes:
        slot: its name on the model; None while it is set aside.
        coming: whether it is being read again.
        failed: why it could not be.
    """

    name: str
    path: str
    read: Callable[[], Adapter] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    slot: str | None = None
    coming: bool = False
    failed: Exception | None = None


Mixture = Mapping[Version, object]  # a weight each, or one for each layer; none is the base


class Shelf:
    """Adapters on a model by the names that requests know them by.

    More may have names than are on the model at once: those that were not asked for the longest are set aside, and read
    again when somebody asks for them.  Looking up is for any thread, `prepare` for one at a time, and what changes the
    model for the one that runs it.

    Args:
        model: the base.
        base_names: names by which requests mean the base alone, beside "base".
        auto: whether a library chooses for requests that ask for "auto".
        most: adapters that are on the model at once; None is any number.
    """

    def __init__(
        self, model: PreTrainedModel, base_names: Iterable[str] = (), *, auto: bool = False, most: int | None = None
    ) -> None:
        self.model, self.auto, self.most = model, auto, most
        self.base_names = (BASE, *base_names)
        self.reads = self.evictions = 0
        self._versions: dict[str, Version] = {}
        self._on_model: dict[Version, None] = {}  # the least recently used first
        self._reserved = False  # whether adapters must stay that something being prepared counts on
        self._numbers, self._lock = count(), Lock()

    @property
    def versions(self) -> list[Version]:
        """What can be asked for now."""
        with self._lock:
            return list(self._versions.values())

    @property
    def resident(self) -> int:
        """How many adapters are on the model."""
        return len(self._on_model)

    def check_name(self, name: str) -> None:
        """Raise unless an adapter may have this name.

        Raises:
            SpectuneError: it may not.
        """
        if not _NAME.fullmatch(name) or name in (*self.base_names, AUTO):
            raise SpectuneError(
                f"{name[:80]!r} cannot be an adapter's name here; use letters, digits, '-', '_', '.' and '/', and no "
                f"name that means the base ({', '.join(dict.fromkeys(self.base_names))}) or {AUTO!r}"
            )

    def check_free(self, name: str) -> None:
        """Raise if an adapter has a name.

        Raises:
            NameInUse: one has.
        """
        if name in self._versions:
            raise NameInUse(f"an adapter {name!r} is loaded already; unload it first, or load it in its place")

    def put(
        self,
        name: str,
        adapter: Adapter,
        path: str | Path,
        *,
        replace: bool = False,
        read: Callable[[], Adapter] | None = None,
    ) -> Version:
        """Put an adapter on the model under a name, or set it aside where there is no room for it.

        Raises:
            NameInUse: the name is taken, and `replace` is not said.
            SpectuneError: the adapter belongs to another base, or the name cannot be one.
        """
        self.check_name(name)
        if not replace:
            self.check_free(name)
        version = Version(name, str(path), read)
        self.reserve(version)
        try:
            ready = self.prepare(version, adapter)
        except BaseException:
            self.release()
            raise
        return self.place(version, ready, replace=replace)

    def fits(self, wanted: Collection[Version], stays: Iterable[Version] = ()) -> bool:
        """Whether there is room on the model for some adapters, once those that may leave have left."""
        if self.most is None:
            return True
        stays = {*wanted, *stays}
        left = [version for version in self._on_model if version in stays or version.read is None]
        return len(left) + sum(version.slot is None for version in wanted) <= self.most

    def reserve(self, version: Version, stays: Iterable[Version] = ()) -> None:
        """Set aside what was not asked for the longest, as far as it may leave, until there is room for one more.

        No adapter leaves the model from now on until `place` or `release`: what is prepared counts on their bases.
        """
        if self.most is not None:
            stays = {version, *stays}
            idle = [other for other in self._on_model if other not in stays and other.read is not None]
            leaving = idle[: max(0, len(self._on_model) + 1 - self.most)]
            self.remove(leaving)
            self.evictions += len(leaving)
        self._reserved = True

    def release(self) -> None:
        """Let adapters leave the model again."""
        self._reserved = False

    def prepare(self, version: Version, adapter: Adapter) -> Prepared:
        """Have an adapter ready to be put on the model, which may be answering meanwhile.

        Raises:
            SpectuneError: the adapter belongs to another base, or is not the one that it was.
        """
        digest = adapter_digest(adapter)
        if version.digest and digest != version.digest:
            raise Unreadable(
                f"the files of the adapter {version.name!r} have changed since it was loaded; load it again, "
                "in its place, to have what they hold now answer"
            )
        version.digest, version.about = digest, _about(adapter)
        taken = set(adapter_names(self.model))
        # a number that was never used: two versions of one name may be on the model at once, while requests that came
        # before end
        slot = next(slot for i in self._numbers if (slot := f"served-{i}") not in taken)
        return Prepared(slot, prepare_attach(self.model, adapter, slot))

    def place(self, version: Version, ready: Prepared, *, replace: bool = True, named: bool = True) -> Version:
        """Put on the model what was prepared, if there is room for it.

        Args:
            version: the adapter.
            ready: what was prepared of it.
            replace: whether another one may have its name.
            named: whether requests are to get it by its name from now on.

        Raises:
            NameInUse: the name was taken meanwhile, and `replace` is not said.
        """
        self.release()
        if named and not replace:
            self.check_free(version.name)
        if version.read is None or self.most is None or len(self._on_model) < self.most:
            ready.put()
            # a new adapter would be the one that answers, for requests that name none
            activate(self.model, None)
            version.slot = ready.slot
            self._on_model[version] = None
        if named:
            with self._lock:
                self._versions[version.name] = version
        return version

    def touch(self, versions: Iterable[Version]) -> None:
        """Take note that adapters on the model are asked for."""
        for version in versions:
            # a mapping keeps the order in which keys came: taken out and put in again it is the last to be set aside
            del self._on_model[version]
            self._on_model[version] = None

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
            # what is being prepared may share a basis with one that nobody asks for any more
            gone = set() if self._reserved else self._on_model.keys() - set(self._versions.values())
        return gone - set(in_use) if gone else gone

    def remove(self, versions: Iterable[Version]) -> None:
        """Take versions off the model."""
        for version in versions:
            if version.slot is not None:
                detach(self.model, version.slot)
            version.slot = None
            del self._on_model[version]

    def mixture(self, weights: Mapping[str, object]) -> dict[Version, object]:
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
            if not name:
                raise SpectuneError(f"{model[:200]!r} lacks a name; a mixture is written pirate:0.7+chef:0.3")
            if name in found:
                raise SpectuneError(f"{name[:80]!r} is named twice in {model[:200]!r}; give it one weight")
            if name not in known and name not in self.base_names:
                raise self._unknown(name)
            found[name] = weight_of(name, weight) if colon else 1.0
        return {name: weight for name, weight in found.items() if name not in self.base_names}


_NUMBER = re.compile(r"\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*")  # float() takes 1_0 and other digits too


def weight_of(name: str, value: Any) -> float:
    """Return an adapter's weight.

    Raises:
        SpectuneError: it is no finite number.
    """
    plain = not isinstance(value, bool) and (not isinstance(value, str) or _NUMBER.fullmatch(value))
    try:
        weight = float(value) if plain else math.nan
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or abs(weight) > 1e6:
        raise SpectuneError(
            f"the weight of {name[:80]!r} must be a number such as 0.7, not {str(value)[:80]!r}; a mixture is written "
            "pirate:0.7+chef:0.3"
        )
    return weight


def _about(adapter: Adapter) -> dict[str, object]:
    methods = dict.fromkeys(term.method.name for layer in adapter.layers.values() for term in layer.terms)
    return {
        "methods": list(methods),
        "parameters": adapter.parameter_count(),
        "layers": list(adapter.layers),
        "whole_modules": list(adapter.modules),
    }


def adapter_digest(adapter: Adapter) -> str:
    """Return a digest of all that an adapter does."""
    tensors = {
        f"{layer} {i} {to_text(term.method)} {term.weight} {key}": tensor
        for layer, update in adapter.layers.items()
        for i, term in enumerate(update.terms)
        for key, tensor in term.trained.items()
    }
    for module, terms in adapter.modules.items():
        tensors |= {f"{module} {t.weight} {t.rows} {key}": v for t in terms for key, v in t.tensors.items()}
    return tensors_digest(tensors)

"""Which adapters answer, with which weights, on a model or within a context of a thread or task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock, current_thread
from typing import cast
from weakref import ReferenceType, WeakSet, ref

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from spectune.errors import SpectuneError
from spectune.layers.layouts import Layouts
from spectune.layers.mixtures import Mixture
from spectune.layers.rows import Rows
from spectune.private import FOREIGN_THREAD, graph_task


class Scope:
    """What answers, on a whole model or within a context.

    Attributes:
        choice: a mixture for every row, or one for each.
        open: until the context is left, wherever that is: another thread or task may do it.
        aside: what the base, which answers alone, is compared with; empty where it is not.
    """

    def __init__(self, choice: Mixture | Rows, selections: Iterable[Selection] = ()) -> None:
        self.choice, self.open = choice, True
        self.aside: dict[Selection, Scope] = {}
        self._selections = frozenset(selections)

    def covers(self, selection: Selection) -> bool:
        """Whether this is the scope of an open context on a part of a model."""
        return self.open and selection in self._selections


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("_scopes", default=())
_generating: ContextVar[bool] = ContextVar("_generating", default=False)
_counting = Lock()


class Selection:
    """Which adapters answer, shared by the adapted layers of a model.

    What `activate` sets is the model's, for every thread.  What a context sets (`within`) is its own: other threads
    and tasks do not see it, and contexts may be left in any order.

    Args:
        frozen: the parameters that adapting froze, to be set free by detaching.

    Attributes:
        contexts: how many are open, in all threads.
        layouts: where rows lie in the inputs of layers, as far as it was found out.
        users: how many adapted layers share it.
        factored: whether training goes through the factors of W where a basis holds all of it.
    """

    def __init__(self, frozen: Iterable[nn.Parameter] = ()) -> None:
        self._model = Scope({})
        self.contexts = 0
        self.layouts = Layouts()
        self.factored = False
        self.frozen = list(frozen)
        self.users = 0
        # by the layer and its name: the layer, and the shape of W
        self._layers: dict[tuple[int, str], tuple[ReferenceType[nn.Module], torch.Size | None]] = {}
        self._in_graphs: WeakSet[Scope] = WeakSet()  # those of forward passes that a backward pass may run again

    def joined_by(self, layer: nn.Module, name: str) -> None:
        """Take note of a layer that shares it."""
        self.users += 1
        self.note(layer, name)

    def note(self, part: nn.Module, name: str, *, shaped: bool = True) -> None:
        """Remember a part of the model by its name, so that it is missed when another takes its place.

        Args:
            part: a layer, or a module that adapters bring whole.
            name: its name.
            shaped: its weight is to keep its shape.
        """
        self._layers[id(part), name] = ref(part), _shape(part) if shaped else None

    def left_by(self, layer: nn.Module) -> None:
        """Forget a layer, which is plain again."""
        self.users -= 1
        self.forget(layer)

    def forget(self, part: nn.Module) -> None:
        """Miss a part no more."""
        self._layers.pop((id(part), vars(part)["adapted_as"]), None)

    def lost(self, there: Mapping[str, object] | None = None) -> list[str]:
        """Return the names of parts that something else took the place of, or whose W has another shape now.

        Args:
            there: the parts that a model has, by their names in it; None looks at the parts alone.
        """
        known = [(name, part(), shape) for (_, name), (part, shape) in self._layers.items()]
        found = [n for n, part, shape in known if part is None or (shape and _shape(part) not in (shape, None))]
        # of a part of the model, and of a model around it, nobody knows what should be there
        if there is not None and {vars(part)["adapted_as"] for part in there.values()} == there.keys():
            found += [n for n, part, _ in known if part is not None and there.get(n) is not part]
        return found

    def forget_lost(self) -> None:
        """Forget the layers that are gone."""
        for key in [key for key, (layer, _) in self._layers.items() if layer() is None]:
            del self._layers[key]
            self.users -= 1

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze parameters until the last of the layers is given back."""
        known = {id(parameter) for parameter in self.frozen}
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in known:
                self.frozen.append(parameter)
            parameter.requires_grad_(False)

    @property
    def mixture(self) -> Mixture:
        """Adapter names and weights for every row, where no context says otherwise."""
        return cast(Mixture, self._model.choice)

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        self._model = Scope(mixture)

    def scope(self) -> Scope:
        """Return what answers here, in this thread or task."""
        for scope in reversed(_scopes.get()):
            if scope.covers(self):
                return scope
        return self._model

    @property
    def scope_of_model(self) -> Scope:
        """What the whole model is set to, for every thread."""
        return self._model

    def scope_with_gradients(self) -> Scope:
        """Return what answers here; in a layer that a backward pass runs again, what answered the first time."""
        scope = self.scope()
        if graph_task() == -1:
            return scope
        # a WeakSet may not change while it is iterated over, and another thread's forward pass may add to it
        with _counting:
            known = list(self._in_graphs)
        if not isinstance(current_thread(), FOREIGN_THREAD):
            # reentrant checkpointing and `torch.utils.checkpoint` run the region in this thread, inside of the context
            # that the backward pass is called in: that one, if it is one of those that a forward pass was in
            if scope in known:
                return scope
        elif len(known) > 1:
            known = [scope for scope in known if scope.open and scope is not self._model] or known
        if len(known) == 1:
            return known[0]
        if known or (self.contexts and scope is self._model):
            raise SpectuneError(
                "a checkpointed layer is run again in a backward pass, and which `route` it was in is not known; "
                "checkpoint with use_reentrant=False, and run each backward pass inside of its own `route`"
            )
        return scope

    def in_graph(self, scope: Scope, y: Tensor) -> None:
        """Remember a scope as long as the graph of a layer's answer y is there."""
        if y.grad_fn is not None:
            # the graph holds the scope, and the set holds it weakly: it is forgotten when nothing can run backward
            # through it any more, with no hook to be called
            cast("dict[str, object]", y.grad_fn.metadata)[_KEY] = scope
            with _counting:
                self._in_graphs.add(scope)

    def of_this_thread(self) -> Selection:
        """Return a selection for the threads of another's, which are in no context: what answers here does there."""
        scope = self.scope()
        if scope is self._model:
            return self
        pinned = Selection(self.frozen)
        pinned.layouts, pinned.factored = self.layouts, self.factored
        # replicas of nn.DataParallel run in threads that have no context of their caller's; the graph they build is one
        # with it
        pinned._model, pinned._in_graphs = scope, self._in_graphs
        return pinned

    def __reduce__(self) -> tuple[object, ...]:  # a copy is in no context and in no graph
        return (
            Selection,
            (),
            {
                "mixture": self.mixture,
                "factored": self.factored,
                "frozen": self.frozen,
                "users": self.users,
                "_layers": {},
            },
        )

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def replaced(name: str) -> str:
    """Return what there is to say of a layer that is another one than was adapted."""
    return (
        f"{name!r} was replaced after it was adapted (resize_token_embeddings does that), and what was trained there "
        "is gone: detach, resize, and adapt then"
    )


def _shape(layer: nn.Module) -> torch.Size | None:
    # None where it is computed, or a replica's; empty where it is sharded away
    weight = layer._parameters.get("weight")
    if weight is None or isinstance(weight, UninitializedParameter) or weight.numel() == 0:
        return None
    return weight.shape


_KEY = "spectune.scope"


@contextmanager
def within(selections: Sequence[Selection], choice: Mixture | Rows, *, compared: bool = False) -> Iterator[None]:
    """Within the context, in this thread or task, have a mixture answer, or one for each row.

    Args:
        selections: of the parts of a model.
        choice: the mixture, or those of rows.
        compared: the answer is compared with what answers outside of the context.
    """
    scope = Scope(choice, selections)
    if compared:
        before = {selection: selection.scope() for selection in selections}
        scope.aside = {selection: s for selection, s in before.items() if not isinstance(s.choice, Rows)}
    _scopes.set((*_scopes.get(), scope))
    _count(selections, 1)
    try:
        yield
    finally:
        scope.open = False
        _count(selections, -1)
        _scopes.set(tuple(scope for scope in _scopes.get() if scope.open))


def _count(selections: Sequence[Selection], more: int) -> None:
    with _counting:
        for selection in selections:
            selection.contexts += more


def is_generating() -> bool:
    """Whether each row of a `route` may stand for several consecutive rows of the batch."""
    return _generating.get()


@contextmanager
def generating() -> Iterator[None]:
    """Within the context each row of a `route` may stand for several consecutive rows of the batch (beams)."""
    token = _generating.set(True)
    try:
        yield
    finally:
        _generating.reset(token)

"""Which part of a layer's input belongs to which row of the batch: told by passes of two rows, together and alone."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from spectune.layers.layouts import GATHERED, MIXED, SHARED, Layout, Layouts, Path, Plan, Seen, where
from spectune.layers.modules import modules_around
from spectune.layers.protocols import Place
from spectune.layers.whole import Part

Values = Mapping[Path, Any]  # what somebody else's module takes or gives
Places = dict[tuple[Place, int], Layout | str]
Plans = dict[nn.Module, dict[object, Plan]]
_NONE: Mapping[str, Any] = {}
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_NUMBERED = re.compile(r"(^|_)\d+(?=\.)|(?<=\.)(\w*_)?\d+(?=\.)")  # parts of a name, but the last
_ROUNDING = 3.0  # times the square root of a dtype's epsilon


class Call(NamedTuple):
    """What a module is called with.

    Args:
        module: the module.
        args, kwargs: the arguments.
        rows: of the batch.
    """

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    rows: int

    @property
    def structure(self) -> object:
        """What calls have in common whose layers have the rows in the same places."""

        def described(value: Any) -> object:
            if isinstance(value, Tensor):
                sizes = tuple(value.shape[1:])
                return sizes if value.is_floating_point() and value.dim() > 2 else tuple(n == 1 for n in sizes)
            return type(value), hasattr(value, "get_seq_length") and value.get_seq_length() > 0

        found = tuple((path, described(value)) for path, value in leaves((self.args, self.kwargs)))
        return self.module, self.module.training, found


class _Guess(NamedTuple):
    """How rows may lie in a call's tensors: along an axis, and in tensors of one axis too if `vectors`."""

    axis: int
    vectors: bool

    def fits(self, tensor: Tensor, rows: int) -> bool:
        return tensor.dim() > max(self.axis, not self.vectors) and tensor.shape[self.axis] == rows


# the likeliest first, since the trial ends with the first reading that nothing contradicts: rows in front, in vectors
# too; then in all but vectors; then behind time, as nn.Transformer has them
_GUESSES = (_Guess(0, True), _Guess(0, False), _Guess(1, False))


def rows_of(args: object, kwargs: object, given: int, expandable: bool) -> int | tuple[int, ...] | None:
    """Return the number of rows of a batch, or the shape of what is no batch of `given` rows; None is no tensor."""
    tensors = [value for _, value in leaves((args, kwargs)) if isinstance(value, Tensor)]
    inputs = [t for t in tensors if t.dim() > 1]
    for axis in (0, 1):
        for tensor in inputs:
            rows = tensor.shape[axis] if tensor.dim() > axis + axis else 0
            if rows == given or (rows and expandable and rows % given == 0):
                return rows
    return tuple((inputs or tensors)[0].shape) if tensors else None


def find_layouts(layouts: Layouts, call: Call, layers: Mapping[str, Part]) -> None:
    """Find out where rows lie in the inputs of layers, with two of the rows of a call that is about to be made.

    Args:
        layouts: what is known; added to.
        call: what is called, and with what.
        layers: the adapted layers of the module by name.
    """
    best: tuple[int, tuple[Places, Plans]] | None = None
    # some models take their rows in the second axis, and some take vectors that are of the rows or of nothing:
    # whichever reading gives the fewest contradictions
    for guess in _GUESSES:
        try:
            found = _verdicts(call, guess, layers)
        except Exception as error:  # whatever a model's code raises for a batch of one row
            layouts.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        wrong = sum(verdict in (MIXED, GATHERED) for verdict in found[0].values())
        if best is None or wrong < best[0]:
            best = wrong, found
        if not wrong:
            break
    layouts.shown.update(layers.values())
    if best is None:
        return
    layouts.failure = None
    places, plans = best[1]
    for key, verdict in places.items():
        layouts.learn(key, verdict)
    for module, plan in plans.items():
        layouts.plans.setdefault(module, {}).update(plan)
    # a layer whose rows cannot be told may stand in a module that takes and gives rows, which then runs once for each
    # choice
    troubled = {layer for (layer, _), verdict in layouts.places.items() if isinstance(verdict, str)}
    for name, layer in layers.items():
        around = [m for m in modules_around(call.module, name) if m in plans]
        if layer in troubled and around:
            layouts.apart[layer] = around[-1]


def _verdicts(call: Call, guess: _Guess, layers: Mapping[str, Part]) -> tuple[Places, Plans]:
    """Return where rows lie in the inputs of layers, and how modules can answer some rows alone."""
    second, turned = _unlike_the_first(call, guess)
    modules = {module for name in layers for module in modules_around(call.module, name)}
    records = []
    # the model's own devices: without a list every GPU of the machine would be woken to have its state forked
    devices = {p.device for p in call.module.parameters() if p.device.type == "cuda"}
    for wanted in ([0, second], [0], [second]):
        with torch.no_grad(), torch.random.fork_rng(devices), _eager():
            # dropout and routers that sample draw alike in each pass; what still differs depends on the other row
            torch.manual_seed(0)
            args, kwargs = _part(call, guess, wanted, second if turned else None)
            with _recording(layers.values(), modules) as record:
                call.module(*args, **kwargs)
        records.append(record)
    both, alone = records[0], records[1:]
    tolerance = _tolerance(call.module)
    places = _places(layers, both, alone, tolerance)
    plans = {module: _plans(module, both, alone, tolerance) for module in modules}
    return places, {module: plan for module, plan in plans.items() if plan}


def _eager() -> AbstractContextManager[object]:
    """Return a context in which nothing is compiled; where nothing was, what compiles takes seconds to import."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _unlike_the_first(call: Call, guess: _Guess) -> tuple[int, bool]:
    """Return a row that differs from the first, or one that is to be turned round so that it does."""
    held = [v for _, v in leaves((call.args, call.kwargs)) if isinstance(v, Tensor) and guess.fits(v, call.rows)]
    if not held:
        raise ValueError("no argument has an axis with a place for each row")
    for tensor in held:
        rows = tensor.detach().movedim(guess.axis, 0)
        for i in range(1, call.rows):
            if not torch.equal(rows[i], rows[0]):
                return i, False
    return 1, True


def _part(
    call: Call, guess: _Guess, wanted: Sequence[int], turned: int | None
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments for some rows, sharing nothing that a forward pass may write to."""
    first = True

    def leaf(_: Path, value: Any) -> Any:
        nonlocal first
        if isinstance(value, Tensor):
            if not guess.fits(value, call.rows):
                return value.detach().clone()
            own = value.detach().index_select(guess.axis, torch.tensor(wanted, device=value.device))
            # where all rows are the same, as in a batch of one prompt, equal answers would say nothing: one row is made
            # another one
            if first and turned is not None and turned in wanted and own.dim() > 1:
                place = [slice(None)] * guess.axis + [list(wanted).index(turned)]
                own[tuple(place)] = own[tuple(place)].flip(-1)
            first = False
            return own
        if isinstance(value, (*_PLAIN, nn.Module)) or callable(value):
            return value
        own = copy.deepcopy(value)
        if hasattr(own, "batch_select_indices") and own.get_seq_length() > 0:
            own.batch_select_indices(torch.tensor(wanted, device=next(call.module.parameters()).device))
        return own

    return walk(call.args, leaf), walk(call.kwargs, leaf)


def _tolerance(module: nn.Module) -> float:
    # a batch of one takes other products, which round otherwise, and depth magnifies that; what really depends on the
    # other row differs by far more
    eps = max((torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()), default=1e-7)
    return min(0.1, _ROUNDING * math.sqrt(eps))


# -- what passes show


class _Record(NamedTuple):
    inputs: dict[nn.Module, list[Seen]]
    calls: dict[nn.Module, list[tuple[Values, Values]]]


@contextmanager
def _recording(layers: Iterable[nn.Module], modules: Iterable[nn.Module]) -> Iterator[_Record]:
    """Within the context note what layers are given, and what modules take and give."""
    record, open_calls = _Record(defaultdict(list), defaultdict(list)), defaultdict(list)
    here = get_ident()  # other threads may pass meanwhile; and a hook that goes may be called without keywords

    def of_layer(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NONE) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if get_ident() != here or given is None:  # as what computes a weight is given nothing
            return
        record.inputs[module].append(Seen.of(given, features=True))

    def before(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object] = _NONE) -> None:
        if get_ident() != here:
            return
        open_calls[module].append(_seen((args, kwargs)))

    def after(module: nn.Module, args: tuple[object, ...], *kwargs_and_output: object) -> None:
        if get_ident() == here:
            record.calls[module].append((open_calls[module].pop(), _seen(kwargs_and_output[-1])))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(of_layer, with_kwargs=True).remove)
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield record


def _seen(tree: object) -> Values:
    """Return what is compared of values, by path: of tensors and plain values; of all else no more than the type."""
    return {
        path: Seen.of(value) if isinstance(value, Tensor) else value if isinstance(value, _PLAIN) else type(value)
        for path, value in leaves(tree)
    }


def _places(layers: Mapping[str, Part], both: _Record, alone: Sequence[_Record], tolerance: float) -> Places:
    found = Layouts()
    for layer in layers.values():
        calls, ones = both.inputs[layer], [record.inputs[layer] for record in alone]
        for i, seen in enumerate(calls):
            verdict = GATHERED if any(len(one) != len(calls) for one in ones) else None
            place = verdict or where(seen, [one[i] for one in ones], tolerance)
            found.learn((layer, len(seen.shape) + 1), place)
    # what a router gave an expert in the trial says nothing of the next call, where it picks others: if one of a kind
    # is given what was picked, all of them are
    for group in _alike(layers):
        if len(group) > 1 and _picked(layers, group, both):
            for name in group:
                for axes in {axes for layer, axes in found.places if layer in {layers[n] for n in group}}:
                    found.places[layers[name], axes] = GATHERED
    return found.places


def _alike(layers: Mapping[str, Part]) -> list[list[str]]:
    """Return the names of layers that differ in the numbers of their place alone, such as those of experts."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in layers:
        groups[_NUMBERED.sub("#", name)].append(name)
    return list(groups.values())


def _picked(layers: Mapping[str, Part], group: Sequence[str], both: _Record) -> bool:
    """Whether some of the layers alike are given what is picked for them: nothing, or less than comes into a module."""
    idle = [n for n in group if not any(math.prod(seen.shape) for seen in both.inputs[layers[n]])]
    if 0 < len(idle) < len(group):
        return True
    for name in group:
        for seen in both.inputs[layers[name]]:
            if len(seen.shape) == 1 and seen.shape[0] not in _tokens(name, layers, both):
                return True
    return False


def _tokens(name: str, layers: Mapping[str, Part], both: _Record) -> set[int]:
    """Return how many slices with features come into the modules around a layer."""
    found = set()
    for module, calls in both.calls.items():
        if any(child is layers[name] for child in module.modules()):
            for taken, _ in calls:
                found |= {math.prod(s.shape[:-1]) for s in taken.values() if isinstance(s, Seen) and len(s.shape) > 1}
    return found


def _plans(module: nn.Module, both: _Record, alone: Sequence[_Record], tolerance: float) -> dict[object, Plan]:
    """Return how a module can answer some rows alone, by the structure of what it takes; nothing if it cannot."""
    plans = {}
    calls, ones = both.calls[module], [record.calls[module] for record in alone]
    if any(len(one) != len(calls) for one in ones):
        return {}
    for i, (taken, given) in enumerate(calls):
        into = _axes(taken, [one[i][0] for one in ones], tolerance)
        out = _axes(given, [one[i][1] for one in ones], tolerance)
        if into is None or out is None or None in out.values() or not any(into.values()):
            return {}
        plan = Plan(into, {path: place for path, place in out.items() if place is not None})
        # calls that look alike and lie otherwise: the next one could be either
        if plans.setdefault(structure_of(taken), plan) != plan:
            return {}
    return plans


def _axes(both: Values, alone: Sequence[Values], tolerance: float) -> dict[Path, Layout | None] | None:
    """Return where rows lie in each of several tensors, None for one that has none; or None if that cannot be said."""
    found: dict[Path, Layout | None] = {}
    for path, value in both.items():
        others: list[Any] = [one.get(path, NotImplemented) for one in alone]
        if not isinstance(value, Seen):
            # of what is known by its type alone nobody can say whether there are rows in it
            if isinstance(value, type) or any(value != other for other in others):
                return None
            continue
        if not all(isinstance(other, Seen) for other in others):
            return None
        place = where(value, others, tolerance)
        if isinstance(place, str) and place != SHARED:
            return None
        found[path] = place if isinstance(place, Layout) else None
    return found


def structure_of(seen: Values) -> object:
    """Return what calls of a module have in common that one plan holds for."""
    return tuple((path, len(v.shape) if isinstance(v, (Seen, Tensor)) else None) for path, v in seen.items())


# -- values within values


def leaves(tree: object, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the values within sequences and mappings, and the path to each."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    else:
        yield path, tree


def walk(tree: object, leaf: Callable[[Path, object], object], path: Path = ()) -> Any:
    """Return sequences and mappings with other values: leaf(path, value) for each."""
    if isinstance(tree, Mapping):
        made: Any = copy.copy(tree)
        for key, value in tree.items():
            made[key] = walk(value, leaf, (*path, key))
        return made
    if isinstance(tree, (list, tuple)):
        values = [walk(value, leaf, (*path, i)) for i, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return leaf(path, tree)

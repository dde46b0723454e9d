"""Batches whose rows have different adapters: factors side by side, and one batched product for many rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spectune.layers.cores import Core
from spectune.layers.mixtures import RowWeights
from spectune.layers.protocols import Layer
from spectune.layers.sources import Sources
from spectune.layers.sums import with_updates
from spectune.layers.updates import Update, updates_in
from spectune.layers.values import values_of
from spectune.private import copy_all
from spectune.speed.dense import linear
from spectune.speed.room import has_room

_LARGEST = 2  # numbers held for each that trains, as PiSSA's; what needs more (VeRA) answers adapter by adapter
_FEW = 8  # rows of each of many matrices, of which a product in 32 bits takes no longer than casting these to 16 does
_SPARE = 4  # times as much memory as a batch needs is kept for another one as large as those before

Use = tuple[Update, RowWeights]


class Pieces(NamedTuple):
    """What an update answers with: L, R, the values of C (None is the identity) and the ratio (None is one).

    Of n updates side by side each has a first axis (n); L and R have none where they are frozen, and all share them.
    """

    left: Tensor
    right: Tensor
    values: Tensor | None
    ratio: Tensor | None


class Stack:
    """The pieces of updates of one kind on a layer, side by side.

    They are kept from call to call, and made again for the updates whose tensors are others than they were.  Where
    memory is short, they are made at every call.

    Args:
        layer: the layer.
        like: an update of the kind.

    Attributes:
        core: one of the cores.
        by_core: whether L and R are shared and nothing else but C makes a difference.
        by_ratio: whether there is one.
        unfit: whether an update turned out to take so much of a row of W that the rest is no difference of products, or
            to be of this kind no longer.
        small: whether what is copied is little more than what trains.
    """

    def __init__(self, layer: Layer, like: Update) -> None:
        self._layer, self.unfit = layer, False
        one, self.core = self._of(like)
        tensors, trained = layer.tensors(like), like.trained()
        # a piece that is one of the tensors is told by being that very object: what `factors` makes of them is
        # another one, and has to be made again when they change
        names = [next((key for key, tensor in tensors.items() if tensor is piece), None) for piece in one]
        shared = [name is not None and name not in trained for name in names]
        self._shared = [piece if of_all else None for piece, of_all in zip(one, shared, strict=True)]
        self._frozen = {
            name: piece for name, piece in zip(names, self._shared, strict=True) if name and piece is not None
        }
        own = {k: piece for k, piece in enumerate(one) if piece is not None and not shared[k]}
        self._trained = {k: name for k in own if (name := names[k]) in trained}
        # what is computed may depend on any trained tensor: all of them are looked at then, and else those alone that
        # are answered with
        self._computed = len(self._trained) < len(own)
        self._names = list(trained) if self._computed else list(self._trained.values())
        self.by_core, self.by_ratio = all(shared[:2]) and one.ratio is None, one.ratio is not None
        self._shapes = {k: piece.shape for k, piece in own.items()}
        self._bytes = sum(piece.nbytes for piece in own.values())
        self.small = sum(map(torch.numel, own.values())) <= _LARGEST * sum(map(torch.numel, trained.values()))
        self._updates: list[Update | None] = []  # whose pieces are kept, by their places
        self._sources, self._of_weight = Sources(wary=True), tuple[Tensor, ...]()
        self._kept: dict[int, Tensor] = {}
        self._version, self._device = 0, one.left.device
        self._refused = math.inf  # updates, for which there was no room

    def is_of(self, like: Update) -> bool:
        """Whether the frozen tensors are those that the layer has now."""
        if not self._frozen:
            return True
        tensors = self._layer.tensors(like)
        return all(tensors.get(name) is piece for name, piece in self._frozen.items())

    def end(self) -> None:
        """Keep nothing, and let the parameters be as they were."""
        self._sources.end()
        self._updates, self._kept = [], {}

    def begin(self) -> None:
        """Look again whether there is room."""
        self._refused = math.inf

    def pieces(self, updates: Sequence[Update]) -> tuple[Pieces, int | None]:
        """Return the pieces of these updates in this order, and a number that is the same as long as they are."""
        n = len(updates)
        self.unfit |= not self.is_of(updates[0])
        if n == 1 and not self._computed:  # one alone is no copy at all
            return self._with({k: values_of(piece)[None] for k, piece in self._pieces_of(updates[0]).items()}), None
        of_weight = self._layer.base().seen() if self.by_ratio else ()
        if of_weight is None or not self._has_room(n):
            made = [self._pieces_of(update) for update in updates]
            of_all = {} if self.unfit else {k: torch.stack([of[k] for of in made]) for k in self._shapes}
            return self._with(of_all), None
        stale = self._stale(updates, of_weight)
        if stale:
            self._renew(updates, stale)
            self._of_weight = tuple(of_weight)
        return self._with({k: kept[:n] for k, kept in self._kept.items()}), self._version

    def placed(self, updates: Sequence[Update], start: int = 0) -> list[int]:
        """Return the order in which updates, laid side by side from a place on, are where they are kept already."""
        there = {update: i for i, update in enumerate(self._updates[start : start + len(updates)])}
        places = [there.get(update) for update in updates]
        order = {place: i for i, place in enumerate(places) if place is not None}
        others = iter([i for i, place in enumerate(places) if place is None])
        return [order[place] if place in order else next(others) for place in range(len(updates))]

    def _has_room(self, count: int) -> bool:
        there = len(next(iter(self._kept.values()))) if self._kept else 0
        if count > there and count < self._refused and not has_room(self._device, 2 * count * self._bytes):
            self._refused = count
        return count <= there or count < self._refused

    def _stale(self, updates: Sequence[Update], of_weight: Sequence[Tensor]) -> list[int]:
        """Return the places where an update's pieces are not those that are kept."""
        n, there, each = len(updates), self._updates, len(self._names)
        if n < len(there):
            self._cut(n)
        if len(of_weight) != len(self._of_weight) or not all(map(operator.is_, of_weight, self._of_weight)):
            return list(range(n))
        changed = self._sources.changed()
        if not changed and n == len(there) and all(map(operator.is_, updates, there)):
            return []
        stale = {place // each for place in changed}
        return [i for i, update in enumerate(updates) if i in stale or i >= len(there) or update is not there[i]]

    @torch.inference_mode(False)
    def _cut(self, count: int) -> None:
        """Keep the first pieces alone."""
        del self._updates[count:]
        self._sources.cut(count * len(self._names))
        self._kept = {k: kept[:count].clone() if _SPARE * count < len(kept) else kept for k, kept in self._kept.items()}

    @torch.inference_mode(False)  # what is kept may be written to later
    @torch.no_grad()
    def _renew(self, updates: Sequence[Update], stale: Sequence[int]) -> None:
        """Keep the pieces that the updates in these places have now."""
        each = len(self._names)
        for place in stale:
            # nobody's, should one of them fail
            self._updates[place : place + 1] = [None]
            for k, name in enumerate(self._names):
                self._sources.put(place * each + k, *updates[place].places()[name])
        made = [self._pieces_of(updates[place]) for place in stale]
        if self.unfit:
            return
        for k, piece in made[0].items():
            if k not in self._kept or len(self._kept[k]) < len(updates):
                self._kept[k] = _grown(self._kept.get(k), len(updates), piece)
            # the places that changed are written into what is there, since a batch of a hundred adapters of which one
            # trains would otherwise be laid side by side anew; the version tells who keeps something made of it
            copy_all([self._kept[k][place] for place in stale], [values_of(of[k]) for of in made])
        for place in stale:
            self._updates[place] = updates[place]
        self._version += 1

    def _pieces_of(self, update: Update) -> dict[int, Tensor]:
        """Return the pieces of an update that are not those of all."""
        if self._computed:
            pieces, _ = self._of(update)
            own = {k: piece for k, piece in enumerate(pieces) if piece is not None and self._shared[k] is None}
        else:
            own = {k: update.tensor(name) for k, name in self._trained.items()}
        self.unfit |= {k: piece.shape for k, piece in own.items()} != self._shapes
        return own

    def _with(self, own: Mapping[int, Tensor]) -> Pieces:
        return Pieces(*(own.get(k, piece) for k, piece in enumerate(self._shared)))  # type: ignore[arg-type]

    def _of(self, update: Update) -> tuple[Pieces, Core]:
        tensors = self._layer.tensors(update)
        factors, ratio = update.method.factors(tensors), update.ratio(tensors, self._layer.base())
        update.scale = factors.scale
        self.unfit |= ratio is not None and ratio.rows is not None
        values = None if ratio is None else ratio.values
        return Pieces(*factors[:2], getattr(factors.core, "values", None), values), factors.core

    def scale(self, update: Update) -> float:
        """Return s of an update."""
        if update.scale is None:
            self._of(update)
        return cast(float, update.scale)


def _grown(before: Tensor | None, count: int, piece: Tensor) -> Tensor:
    """Return memory for so many pieces, with those that there were in front."""
    # more than are needed, where a batch has begun to grow
    more = count if before is None else count + count // 4
    tall = piece.dim() == 2 and piece.shape[0] > piece.shape[1]
    # L by columns, of which a product with one row each reads in the order in which they lie
    kept = piece.new_empty(more, *piece.shape[::-1]).mT if tall else piece.new_empty(more, *piece.shape)
    if before is not None:
        kept[: len(before)] = before
    return kept


class Part(NamedTuple):
    """Rows that one batched product answers: those of the first of n updates, as many of the second, and so on.

    Args:
        rows: of the batch; None for all in order.
        start, stop: where the n updates are among those of a stack.
        weights: of each row with the update's scale (rows x 1 x 1), or one number.
        shares: without the scale.
    """

    rows: Tensor | None
    start: int
    stop: int
    weights: Tensor | float = 1.0
    shares: Tensor | float = 1.0

    def add(
        self, y: Tensor, x: Tensor, plain: Tensor, bias: Tensor | None, pieces: Pieces, core: Core, n: int | None = None
    ) -> None:
        """Add to y (batch x m x out) what n updates make of x (batch x m x in) and of the base's answer to it."""
        left, right, values, ratio = pieces
        own = slice(self.start, self.stop)
        if n is None:
            n = self.stop - self.start
            left, right = (m[own] if m.dim() == 3 and n < len(m) else m for m in (left, right))
            core = core if values is None else core.holding(values[own])
        rows = self.rows
        x = x if rows is None else x.index_select(0, rows)
        count, m, in_features = x.shape
        t = core.apply(_product(x.reshape(n, -1, in_features), right))
        # weights go to the activation of rank width, and not to the answer, which is as wide as the layer
        t = _weighted(t.reshape(count, m, -1), self.weights).reshape(t.shape)
        # all rows share L, as where the cores alone differ: the product adds to y as it is written
        if rows is None and ratio is None and left.dim() == 2:
            y.view(count * m, -1).addmm_(t.reshape(count * m, -1), left.to(t.dtype).mT)
            return
        added = _product(t, left)
        if ratio is not None:
            # r (W x + dW x) is wanted and W x is in y already: what is added is r dW x + (r - 1) W x, without the
            # bias, which DoRA has outside of its magnitude
            base = plain if rows is None else plain.index_select(0, rows)
            base = _weighted(base if bias is None else base - bias, self.shares).reshape(added.shape)
            each = ratio[own, None]
            added = added.to(base.dtype).mul_(each.to(base.dtype)).addcmul_(base, (each - 1).to(base.dtype))
        added = added.reshape(count, m, -1)
        if rows is None:
            y.add_(added.to(y.dtype))
        else:
            y.index_add_(0, rows, added.to(y.dtype))


class _ByFactors:
    """Updates with factors of their own: those with as many rows as each other at once."""

    def __init__(self, stack: Stack, uses: list[Use], x: Tensor) -> None:
        # a batched product takes as many rows of each matrix as of every other: those with equally many go together
        uses = sorted(uses, key=lambda use: len(use[1].uses))
        self.stack, self.updates = stack, list[Update]()
        self._parts: list[Part] = []
        start = 0
        for _, group in groupby(uses, key=lambda use: len(use[1].uses)):
            part = list(group)
            part = [part[i] for i in stack.placed([update for update, _ in part], start)]
            entries = [(row, float(w) * u.weight, stack.scale(u)) for u, share in part for row, w in share.uses]
            rows = _index([row for row, _, _ in entries], x)
            weights = _column([w * s for _, w, s in entries], x)
            self._parts.append(Part(rows, start, start + len(part), weights, _column([w for _, w, _ in entries], x)))
            start += len(part)
            self.updates += [update for update, _ in part]

    def add(self, found: tuple[Pieces, object], y: Tensor, x: Tensor, plain: Tensor, bias: Tensor | None) -> None:
        """Add to y what the updates, given their pieces, make of x and of the base's answer to it."""
        pieces, _ = found
        for part in self._parts:
            part.add(y, x, plain, bias, pieces, self.stack.core)


class _ByCore:
    """Updates over one basis: their cores are added in each row, whatever the mixture."""

    def __init__(self, stack: Stack, uses: list[Use], x: Tensor) -> None:
        uses = [uses[i] for i in stack.placed([update for update, _ in uses])]
        self.stack, self.updates = stack, [update for update, _ in uses]
        mixtures: dict[int, list[tuple[int, float]]] = {}
        for k, (update, share) in enumerate(uses):
            for row, weight in share.uses:
                mixtures.setdefault(row, []).append((k, float(weight) * update.weight * stack.scale(update)))
        rows = sorted(mixtures)
        # many rows of a batch mostly have few mixtures
        places: dict[Any, int] = {}  # rows of the same mixture have one core
        index = [places.setdefault(tuple(mixtures[row]), len(places)) for row in rows]
        entries = [(i, k, weight) for mixture, i in places.items() for k, weight in mixture]
        self._to, self._of, self._weights = (
            torch.tensor(column, device=x.device) for column in zip(*entries, strict=True)
        )
        # each row has a core of its own, as it is: what lies side by side is what answers, and nothing is mixed
        self._as_they_are = entries == [(i, i, 1.0) for i in range(len(uses))]
        self._mixtures, self._index = len(places), None
        if len(places) != len(rows):
            self._index = torch.tensor(index, device=x.device)
        self._part, self._rows = Part(_index(rows, x), 0, len(rows)), len(rows)
        self._mixed: tuple[int | None, Tensor] | None = None

    def add(self, found: tuple[Pieces, Any], y: Tensor, x: Tensor, plain: Tensor, bias: Tensor | None) -> None:
        """Add to y what the updates, given their pieces, make of x."""
        pieces, version = found
        mixed = self._mixed
        if mixed is None or version is None or mixed[0] != version:
            mixed = self._mixed = version, self._mix(pieces.values, x.dtype)
        core = self.stack.core.holding(mixed[1])
        self._part.add(y, x, plain, bias, pieces, core, self._rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _mix(self, values: Any, dtype: torch.dtype) -> Tensor:
        """Return the values of each row's core."""
        if not self._as_they_are:
            own = values.index_select(0, self._of)
            values = own * self._weights.to(own).view(-1, *(1,) * (own.dim() - 1))
            # otherwise no mixture has two parts, and there is nothing to add up
            if len(self._of) != self._mixtures:
                values = values.new_zeros(self._mixtures, *values.shape[1:]).index_add_(0, self._to, values)
        # a core for each mixture up to here, so that a hundred rows of one mixture cost one; for each row from here
        values = values.to(dtype)
        return values if self._index is None else values.index_select(0, self._index)


class RoutedForward:
    """How a layer answers a batch whose rows have different adapters, without gradients.

    Args:
        layer: the layer.
        shares: the part of each adapter that has one.
        x: the input (batch x ... x in).
        stacks: what was found out for other batches; added to.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, layer: Layer, shares: dict[str, RowWeights], x: Tensor, stacks: dict[object, Stack]) -> None:
        self._layer, self._there = layer, list(layer.adapters._modules.values())
        self._groups: list[_ByCore | _ByFactors] = []
        self._alone: list[Use] = []
        self._copies = self._unfit = False
        kinds: dict[object, list[Use]] = {}
        for name, share in shares.items():
            for update in updates_in(layer.adapters, name):
                dropped = update.training and update.method.drop
                if not update.method.in_factors or dropped or _cancels(update, layer):
                    self._alone.append((update, share))
                    continue
                # of one basis and of the same shapes: what can lie side by side in one tensor
                shapes = [(key, p.shape, p.dtype) for key, p in update.trained().items()]
                # and of one thread, which no other gets in the way of
                kind = layer, x.device, get_ident(), update.basis_key, *shapes
                kinds.setdefault(kind, []).append((update, share))
        for kind, uses in kinds.items():
            stack = stacks.get(kind)
            if stack is None or not stack.is_of(uses[0][0]):
                stack = Stack(layer, uses[0][0])
            stack.begin()
            if not stack.small:
                self._alone += uses
                continue
            stacks[kind] = stack
            self._groups.append((_ByCore if stack.by_core else _ByFactors)(stack, uses, x))
            self._copies |= stack.by_ratio
        self._copies |= bool(self._alone)
        # of x no more than its rows, dtype and device: to hold x itself would keep an activation as long as this
        # lives
        self._again = partial(RoutedForward, layer, shares, x.new_empty(x.shape[0], 0), stacks)

    @property
    def outdated(self) -> bool:
        """Whether an adapter came or went, or turned out not to be answered with the others."""
        # modules are equal if they are the same: another adapter by the old name is noticed too
        return self._unfit or list(self._layer.adapters._modules.values()) != self._there

    def answer(self, x: Tensor, plain: Tensor) -> Tensor:
        """Return the answer to x, where the base's is `plain`, which may be written to."""
        pieces = [group.stack.pieces(group.updates) for group in self._groups]
        if any(group.stack.unfit for group in self._groups):
            # found out as the pieces were made: what takes W away goes by itself from now on, row by row of W + dW, and
            # what is of another kind by now among its like
            self._unfit = True
            for group in self._groups:
                group.stack.unfit = False
            return self._again().answer(x, plain)
        # what is multiplied by a ratio, or answered by itself, needs the base's answer as it was
        y = plain.clone() if self._copies else plain
        rows, out = x.reshape(x.shape[0], -1, x.shape[-1]), (x.shape[0], -1, y.shape[-1])
        for group, own in zip(self._groups, pieces, strict=True):
            group.add(own, y.view(out), rows, plain.view(out), self._layer.bias)
        return with_updates(self._layer, self._alone, x, plain, y) if self._alone else y


def _index(rows: list[int], x: Tensor) -> Tensor | None:
    return None if rows == list(range(x.shape[0])) else torch.tensor(rows, device=x.device)


def _column(weights: list[float], x: Tensor) -> Tensor | float:
    if len(set(weights)) == 1:
        return weights[0]
    return torch.tensor(weights, dtype=x.dtype, device=x.device).view(-1, 1, 1)


def _weighted(t: Tensor, weights: Tensor | float) -> Tensor:
    return t if isinstance(weights, float) and weights == 1.0 else t * weights


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x M^T for x (n x m x in), with one M or n of them.

    With a few rows for each of many matrices the answer is in M's dtype.
    """
    if matrix.dim() == 2:
        return linear(x, matrix.to(x.dtype))
    if x.shape[1] > _FEW or x.device.type != "cpu":
        return torch.bmm(x, matrix.to(x.dtype).mT)
    x = x.to(matrix.dtype)
    # a single row of 16 bits is taken for a column by the quicker of two kernels; in 32 it is the other way round
    if x.shape[1] == 1 and x.dtype.itemsize < 4 and matrix.shape[1] < matrix.shape[2]:
        return torch.bmm(matrix, x.mT).mT
    return torch.bmm(x, matrix.mT)


def _cancels(update: Update, layer: Layer) -> bool:
    """Whether an update takes so much of some row of W that the rest is not to be had as a difference."""
    if update.method.additive:
        return False
    ratio = update.ratio(layer.tensors(update), layer.base())
    return ratio is not None and ratio.rows is not None

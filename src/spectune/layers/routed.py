"""Batches whose rows have different adapters: one batched product for many rows."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectune.layers.cores import Core
from spectune.layers.mixtures import RowWeights
from spectune.layers.protocols import Layer
from spectune.layers.stacks import Pieces, Stack
from spectune.layers.sums import with_updates
from spectune.layers.updates import Update, updates_in
from spectune.speed.dense import linear

_FEW = 8  # rows of each of many matrices, of which a product in 32 bits takes no longer than casting these to 16 does

Use = tuple[Update, RowWeights]


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
        of_all = (weight for share in shares.values() for _, weight in share.uses)
        self._moving = [(weight, float(weight)) for weight in of_all if isinstance(weight, Tensor)]
        # of x no more than its rows, dtype and device: to hold x itself would keep an activation as long as this
        # lives
        self._again = partial(RoutedForward, layer, shares, x.new_empty(x.shape[0], 0), stacks)

    @property
    def outdated(self) -> bool:
        """Whether an adapter came or went, has another weight, or turned out not to be answered with the others."""
        # modules are equal if they are the same: another adapter by the old name is noticed too
        if self._unfit or list(self._layer.adapters._modules.values()) != self._there:
            return True
        return any(float(weight) != seen for weight, seen in self._moving)

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

"""Batches whose rows have different adapters: factors side by side, and one batched product for many rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectune.layers.mixtures import RowWeights
from spectune.layers.protocols import Layer
from spectune.layers.updates import Update
from spectune.speed.dense import linear

_LARGEST = 2  # numbers held for each that trains, as PiSSA's; what needs more (VeRA) answers adapter by adapter

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
    """The pieces of updates of one kind on a layer, side by side: a copy, renewed where an update has changed.

    Args:
        layer: the layer.
        like: an update of the kind.
        dtype: of the input.

    Attributes:
        pieces: of the updates that are held.
        scales: s of each.
        core: one of the cores.
        by_core: whether L and R are shared and nothing else but C makes a difference.
        small: whether what is copied is little more than what trains.
    """

    def __init__(self, layer: Layer, like: Update, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, _held_as(dtype, like)
        one, self.core, _ = self._of(like)
        basis: Any = layer.bases._modules.get(like.basis_key)
        frozen = [] if basis is None else list(basis.tensors().values())
        self._shared = [any(piece is tensor for tensor in frozen) for piece in one]
        self.by_core = all(self._shared[:2]) and one.ratio is None
        copied = sum(p.numel() for p, shared in zip(one, self._shared, strict=True) if p is not None and not shared)
        self.small = copied <= _LARGEST * sum(p.numel() for p in _trained(like))
        self._held: list[tuple[Update, int]] = []
        self._parameters: list[Tensor] = []
        self._copied = 0  # times

    @property
    def state(self) -> tuple[int, int]:
        """What stays the same as long as the stack holds the updates that it held, and they are not written to."""
        return self._copied, sum([p._version for p in self._parameters])

    def hold(self, updates: Sequence[Update]) -> None:
        """Have the pieces of these updates in this order, and copy those alone that are not there."""
        wanted = [(update, sum([p._version for p in _trained(update)])) for update in updates]
        if len(wanted) != len(self._held):
            self.pieces = self._room(updates[0], len(updates))
            self.scales = [1.0] * len(updates)
            self._held = [(updates[0], -1)] * len(updates)
        changed = [i for i, pair in enumerate(zip(wanted, self._held, strict=True)) if pair[0] != pair[1]]
        self._copied += bool(changed)
        found = [self._of(updates[i]) for i in changed]
        for i, (_, _, scale) in zip(changed, found, strict=True):
            self.scales[i] = scale
        for k, (pieces, shared) in enumerate(zip(self.pieces, self._shared, strict=True)):
            if changed and pieces is not None and not shared:
                places, own = pieces.unbind(), [of[k] for of, _, _ in found]
                torch._foreach_copy_([places[i] for i in changed], own)  # type: ignore[arg-type]
        self._held = wanted
        self._parameters = [p for update in updates for p in _trained(update)]

    def _room(self, like: Update, n: int) -> Pieces:
        def room(piece: Tensor, shared: bool, dtype: torch.dtype) -> Tensor:
            return piece if shared else piece.new_empty(n, *piece.shape, dtype=dtype)

        (left, right, values, ratio), shared = self._of(like)[0], self._shared
        return Pieces(
            room(left, shared[0], self._dtype),
            room(right, shared[1], self._dtype),
            None if values is None else room(values, False, values.dtype),
            None if ratio is None else room(ratio, False, ratio.dtype),
        )

    def _of(self, update: Update) -> tuple[Pieces, Any, float]:
        tensors = self._layer.tensors(update)
        factors, ratio = update.method.factors(tensors), update.ratio(tensors, self._layer.base())
        values = None if ratio is None else ratio.values
        return Pieces(*factors[:2], getattr(factors.core, "values", None), values), factors.core, factors.scale


class Part(NamedTuple):
    """Rows that one batched product answers: those of the first of n updates, as many of the second, and so on.

    Args:
        rows: of the batch; None for all in order.
        n: how many updates.
        left, right: L and R.
        core: C, its values those of n updates, or those that `index` picks from for each row.
        index: (rows), or None.
        ratio: (n x 1 x out), or None, and the ratio less one.
        weights: of each row with the update's scale (rows x 1 x 1), or one number.
        shares: without the scale.
    """

    rows: Tensor | None
    n: int
    left: Tensor
    right: Tensor
    core: Any
    index: Tensor | None = None
    ratio: tuple[Tensor, Tensor] | None = None
    weights: Tensor | float = 1.0
    shares: Tensor | float = 1.0

    def add(self, y: Tensor, x: Tensor, plain: Tensor, bias: Tensor | None) -> None:
        """Add to y (batch x m x out) what the updates make of x (batch x m x in) and of the base's answer to it."""
        core, rows = self.core, self.rows
        if self.index is not None:
            core = replace(core, values=core.values.index_select(0, self.index))
        x = x if rows is None else x.index_select(0, rows)
        count, m, in_features = x.shape
        t = core.apply(_product(x.reshape(self.n, -1, in_features), self.right))
        t = _weighted(t.reshape(count, m, -1), self.weights).reshape(t.shape)
        if rows is None and self.ratio is None and self.left.dim() == 2:
            y.view(count * m, -1).addmm_(t.reshape(count * m, -1), self.left.to(t.dtype).mT)
            return
        added = _product(t, self.left)
        if self.ratio is not None:
            base = plain if rows is None else plain.index_select(0, rows)
            base = _weighted(base if bias is None else base - bias, self.shares).reshape(added.shape)
            ratio, more = self.ratio
            added = added.to(base.dtype).mul_(ratio).addcmul_(base, more)
        added = added.reshape(count, m, -1)
        if rows is None:
            y.add_(added)
        else:
            y.index_add_(0, rows, added.to(y.dtype))


class RoutedForward:
    """How a layer answers a batch whose rows have different adapters, without gradients.

    Args:
        layer: the layer.
        shares: the part of each adapter that has one.
        x: the input (batch x ... x in).
        stacks: what was held for other batches; added to.
    """

    @torch.inference_mode(False)  # what is held may be written to later
    @torch.no_grad()
    def __init__(self, layer: Layer, shares: dict[str, RowWeights], x: Tensor, stacks: dict[Any, Stack]) -> None:
        self._layer, self._there = layer, list(layer.adapters._modules.values())
        self._stacks: list[tuple[Stack, tuple[int, int]]] = []
        self._parts: list[Part] = []
        self._alone: list[Use] = []
        kinds: dict[Any, list[Use]] = {}
        for name, share in shares.items():
            for update in layer.adapters[name]:  # type: ignore[attr-defined]
                dropped = update.training and update.method.drop
                if update.method.replaces or dropped or _unversioned(update) or _cancels(update, layer):
                    self._alone.append((update, share))
                    continue
                shapes = [(key, p.shape) for key, p in update._parameters.items()]
                kinds.setdefault((layer, x.dtype, x.device, update.basis_key, *shapes), []).append((update, share))
        for kind, uses in kinds.items():
            stack = stacks.get(kind) or Stack(layer, uses[0][0], x.dtype)
            if not stack.small:
                self._alone += uses
                continue
            stacks[kind] = stack
            self._parts += (_by_core if stack.by_core else _by_factors)(stack, uses, x)
            self._stacks.append((stack, stack.state))
        self._copies = bool(self._alone) or any(part.ratio is not None for part in self._parts)

    @property
    def outdated(self) -> bool:
        """Whether an adapter came, went or changed."""
        there = list(self._layer.adapters._modules.values())
        return there != self._there or any(stack.state != state for stack, state in self._stacks)

    def answer(self, x: Tensor, plain: Tensor) -> Tensor:
        """Return the answer to x, where the base's is `plain`, which may be written to."""
        y = plain.clone() if self._copies else plain
        rows, out = x.reshape(x.shape[0], -1, x.shape[-1]), (x.shape[0], -1, y.shape[-1])
        for part in self._parts:
            part.add(y.view(out), rows, plain.view(out), self._layer.bias)
        return self._layer.sum(self._alone, x, plain, y) if self._alone else y


def _by_core(stack: Stack, uses: list[Use], x: Tensor) -> Iterator[Part]:
    """Updates over one basis: their cores are added in each row, whatever the mixture."""
    stack.hold([update for update, _ in uses])
    mixtures: dict[int, list[tuple[int, float]]] = {}
    for k, (update, share) in enumerate(uses):
        for row, weight in share.uses:
            mixtures.setdefault(row, []).append((k, float(weight) * update.weight * stack.scales[k]))
    rows = sorted(mixtures)
    places: dict[Any, int] = {}  # rows of the same mixture have one core
    index = [places.setdefault(tuple(mixtures[row]), len(places)) for row in rows]
    values: Any = stack.pieces.values
    entries = [(i, k, weight) for mixture, i in places.items() for k, weight in mixture]
    to, of, factors = (torch.tensor(column, device=x.device) for column in zip(*entries, strict=True))
    mixed = values[of] * factors.to(values).view(-1, *(1,) * (values.dim() - 1))
    if len(entries) != len(places):
        mixed = values.new_zeros(len(places), *values.shape[1:]).index_add_(0, to, mixed)
    core = replace(stack.core, values=mixed.to(x.dtype))
    picked = None if len(places) == len(rows) else torch.tensor(index, device=x.device)
    yield Part(_index(rows, x), len(rows), stack.pieces.left, stack.pieces.right, core, picked)


def _by_factors(stack: Stack, uses: list[Use], x: Tensor) -> Iterator[Part]:
    """Updates with factors of their own: those with as many rows as each other at once."""
    uses = sorted(uses, key=lambda use: len(use[1].uses))
    stack.hold([update for update, _ in uses])
    left, right, values, ratio = stack.pieces
    start = 0
    for _, group in groupby(uses, key=lambda use: len(use[1].uses)):
        part = list(group)
        own = slice(start, start := start + len(part))
        entries = [
            (row, float(w) * u.weight, s)
            for (u, share), s in zip(part, stack.scales[own], strict=True)
            for row, w in share.uses
        ]
        core = stack.core if values is None else replace(stack.core, values=values[own])
        yield Part(
            _index([row for row, _, _ in entries], x),
            len(part),
            left[own] if left.dim() == 3 else left,
            right[own] if right.dim() == 3 else right,
            core,
            ratio=None if ratio is None else _ratios(ratio[own, None], x.dtype),
            weights=_column([w * s for _, w, s in entries], x),
            shares=_column([w for _, w, _ in entries], x),
        )


def _ratios(ratio: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ratio.to(dtype), (ratio - 1).to(dtype)


def _index(rows: list[int], x: Tensor) -> Tensor | None:
    return None if rows == list(range(x.shape[0])) else torch.tensor(rows, device=x.device)


def _column(weights: list[float], x: Tensor) -> Tensor | float:
    if len(set(weights)) == 1:
        return weights[0]
    return torch.tensor(weights, dtype=x.dtype, device=x.device).view(-1, 1, 1)


def _weighted(t: Tensor, weights: Tensor | float) -> Tensor:
    return t if isinstance(weights, float) and weights == 1.0 else t * weights


def _held_as(dtype: torch.dtype, update: Update) -> torch.dtype:
    """Return the dtype of factors side by side that meet an input of `dtype`.

    With a row for each of many matrices a processor spends more time on 16 bits than memory does on 32.
    """
    near = _trained(update)[0].device.type == "cpu"
    return torch.float32 if near and dtype in (torch.bfloat16, torch.float16) else dtype


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x M^T for x (n x m x in), with one M or n of them; a row for each of n is answered in M's dtype."""
    if matrix.dim() == 2:
        return linear(x, matrix.to(x.dtype))
    if x.shape[1] > 1:
        return torch.bmm(x, matrix.to(x.dtype).mT)
    x = x.to(matrix.dtype)
    wide = matrix.shape[1] < matrix.shape[2]
    return torch.bmm(matrix, x.mT).mT if wide else torch.bmm(x, matrix.mT)


def _unversioned(update: Update) -> bool:
    """Whether changes of an update go unnoticed."""
    return any(p.is_inference() for p in _trained(update))


def _cancels(update: Update, layer: Layer) -> bool:
    """Whether an update takes so much of some row of W that the rest is not to be had as a difference."""
    if update.method.additive:
        return False
    ratio = update.ratio(layer.tensors(update), layer.base())
    return ratio is not None and ratio.rows is not None


def _trained(update: Update) -> list[Tensor]:
    return list(update._parameters.values())  # type: ignore[arg-type]

"""Cores of many adapters over the bases of one layer: for each token the core of its own adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectune.adapters.terms import Term
from spectune.errors import SpectuneError
from spectune.layers.cores import Core, Dense, Diagonal

_ALIKE = 2  # tokens an adapter, up to which a copy of its core for each is faster than a product for each adapter
Slicing = Callable[[Tensor], Tensor]


class Share(NamedTuple):
    """What an adapter has over one basis of a layer.

    Args:
        left: L (out x p).
        right: R (q x in).
        core: C, whose values are the adapter's, its scale and weight included.
    """

    left: Tensor
    right: Tensor
    core: Core


Kind = tuple[str, tuple[object, ...], torch.Size]  # the key of a basis, the layout of cores over it, their shape


def shares_of(layer: str, terms: tuple[Term, ...]) -> dict[Kind, Share]:
    """Return what terms over frozen L and R come to, by kind: cores of one layout over one basis are added.

    Raises:
        SpectuneError: a method that has other factors.
    """
    found: dict[Kind, Share] = {}
    for term in terms:
        if not term.method.core_only:
            raise SpectuneError(f"{term.method.name} on {layer!r} has no core over a frozen basis")
        factors = term.method.factors({**(term.basis or {}), **term.trained})
        values = factors.core.values
        assert values is not None
        values = values.float() * (term.weight * float(factors.scale))
        kind = term.method.basis_key, factors.core.layout, values.shape
        before = found.get(kind)
        if before is not None:
            assert before.core.values is not None
            values = values + before.core.values
        found[kind] = Share(factors.left, factors.right, factors.core.holding(values))
    return found


class Rows(NamedTuple):
    """Tokens whose adapters are in some slots.

    Args:
        tokens: which they are; None for all of a pass.
        slots: the slot of each.
        groups: for each slot which of them are its own.
    """

    tokens: Tensor | None
    slots: Tensor
    groups: dict[int, Tensor]


class Batch:
    """Whose the tokens of a pass are: what every layer asks is found once, and nothing of it on the device.

    Args:
        slots: the slot of each token's adapter, -1 for those without cores.
        device: of the model.
    """

    def __init__(self, slots: Sequence[int], device: torch.device | str) -> None:
        self._slots, self._device = slots, device
        self.present = frozenset(slots) - {-1}
        self._found: dict[frozenset[int], Rows] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def first(self, count: int) -> Batch:
        """Return the batch of the first so many tokens."""
        return self if count >= len(self) else Batch(self._slots[:count], self._device)

    def rows(self, of: frozenset[int]) -> Rows:
        """Return the tokens whose adapters are in these slots."""
        if of not in self._found:
            tokens = [i for i, slot in enumerate(self._slots) if slot in of]
            slots, groups = [self._slots[i] for i in tokens], defaultdict(list)
            for place, slot in enumerate(slots):
                groups[slot].append(place)
            some = None if len(tokens) == len(self._slots) else self._held(tokens)
            self._found[of] = Rows(some, self._held(slots), {slot: self._held(own) for slot, own in groups.items()})
        return self._found[of]

    def _held(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self._device, non_blocking=True)


class _Whole:
    """A matrix M, by which inputs are multiplied, in the dtype that the model computes in."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._dtype = matrix.contiguous(), matrix.dtype

    def __len__(self) -> int:
        return len(self._matrix)

    @property
    def bytes(self) -> int:
        return self._matrix.nbytes

    def times(self, x: Tensor) -> Tensor:
        """Return x M."""
        return torch.mm(x.to(self._dtype), self._matrix)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add x M to y."""
        if y.dtype == self._dtype:
            y.addmm_(x, self._matrix)
        else:
            y.add_(self.times(x))


class _EightBits(_Whole):
    """A matrix as integers of 8 bits with a scale for each singular vector, which a pass brings to the model's dtype.

    Args:
        matrix: with a singular vector in each row (L^T), or in each column (R^T).
        dim: along which a vector lies.
    """

    def __init__(self, matrix: Tensor, dim: int) -> None:
        super().__init__(matrix)
        largest = matrix.float().abs().amax(dim)
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        self._matrix = (matrix.float() / scale.unsqueeze(dim)).round_().to(torch.int8).contiguous()
        self._scale, self._before = scale.to(self._dtype), dim == 1

    @property
    def bytes(self) -> int:
        return super().bytes + self._scale.nbytes

    def times(self, x: Tensor) -> Tensor:
        matrix = self._matrix.to(self._dtype)
        x = x.to(self._dtype)
        return torch.mm(x * self._scale, matrix) if self._before else torch.mm(x, matrix) * self._scale

    def add(self, y: Tensor, x: Tensor) -> None:
        y.add_(self.times(x))


class Bound:
    """A basis on the device, and the values of the adapters that are in slots.

    Args:
        share: of any adapter over the basis.
        slots: adapters at once.
        outputs: which features of the layer's output it answers for.
        like: a tensor of the device and dtype that the model computes in.
        left, right: make of L and R the part that is this process'.
        beside: one over the same basis, whose L and R it takes.
        eight_bits: keep L and R in 8 bits: half the memory of 16, and some hundredths of the update.
    """

    def __init__(
        self,
        share: Share,
        slots: int,
        outputs: slice,
        like: Tensor,
        left: Slicing,
        right: Slicing,
        beside: Bound | None = None,
        eight_bits: bool = False,
    ) -> None:
        self.outputs = outputs
        if beside is None:
            lefts = left(share.left).mT.to(like.device, like.dtype, copy=True)
            rights = right(share.right).mT.to(like.device, like.dtype, copy=True)
            self.left = _EightBits(lefts, 1) if eight_bits else _Whole(lefts)
            self.right = _EightBits(rights, 0) if eight_bits else _Whole(rights)
        else:
            self.left, self.right = beside.left, beside.right
        self._core: Core = share.core
        assert share.core.values is not None
        self._values = torch.zeros(slots, *share.core.values.shape, device=like.device, dtype=like.dtype)
        self.used: set[int] = set()

    @property
    def bytes(self) -> int:
        """Bytes of L, R and the values."""
        return self.left.bytes + self.right.bytes + self._values.nbytes

    def set(self, slot: int, share: Share) -> None:
        """Put an adapter's values into a slot."""
        assert share.core.values is not None
        self._values[slot].copy_(share.core.values)
        self.used.add(slot)

    def reset(self, slot: int) -> None:
        """Empty a slot."""
        self.used.discard(slot)

    def add(self, x: Tensor, y: Tensor, batch: Batch) -> None:
        """Add to y (tokens x out) what the adapters of tokens make of x (tokens x in).

        Args:
            x: the layer's input.
            y: its output, written to.
            batch: whose the tokens are.
        """
        own = batch.present & self.used
        if not own:
            return
        rows, part = batch.rows(own), y[:, self.outputs]
        t = self.right.times(x if rows.tokens is None else x.index_select(0, rows.tokens))
        t = self._through_cores(t, rows)
        if rows.tokens is None:
            self.left.add(part, t)
        else:
            part.index_add_(0, rows.tokens, self.left.times(t).to(y.dtype))

    def _through_cores(self, t: Tensor, rows: Rows) -> Tensor:
        if isinstance(self._core, Diagonal):
            return t.mul_(self._values.index_select(0, rows.slots))
        if isinstance(self._core, Dense) and len(t) <= _ALIKE * len(rows.groups):
            return self._core.holding(self._values.index_select(0, rows.slots)).apply(t[:, None])[:, 0]
        found = t.new_empty(len(t), len(self.left))
        for slot, own in rows.groups.items():
            found.index_copy_(0, own, self._core.holding(self._values[slot]).apply(t.index_select(0, own)))
        return found


class LayerCores:
    """All that a layer of the engine has beside its LoRAs: bases by part of its output and kind."""

    def __init__(self) -> None:
        self.bounds: dict[tuple[int, Kind], Bound] = {}

    def bases(self, part: int) -> dict[str, Bound]:
        """Return what has the bases that are at hand for a part of the output, by their keys."""
        return {kind[0]: bound for (of, kind), bound in self.bounds.items() if of == part}

    def add(self, x: Tensor, y: Tensor, batch: Batch) -> None:
        """Add to y (tokens x out), in place, what the adapters of tokens make of x (tokens x in)."""
        for bound in self.bounds.values():
            bound.add(x, y, batch)

    def reset(self, slot: int) -> None:
        """Empty a slot."""
        for bound in self.bounds.values():
            bound.reset(slot)

    def set(self, slot: int, part: int, shares: Mapping[Kind, Share]) -> None:
        """Put into a slot what an adapter has on a part of the layer's output; the bases must be bound."""
        for key, share in shares.items():
            self.bounds[part, key].set(slot, share)

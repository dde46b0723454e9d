"""Cores of many adapters over the bases of one layer: for each token the core of its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spectune.adapters.terms import Term
from spectune.errors import SpectuneError
from spectune.layers.cores import Core, Diagonal

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


class _Whole:
    """Singular vectors (p x n), a row each, in the dtype that the model computes in."""

    def __init__(self, vectors: Tensor) -> None:
        self._vectors, self._dtype = vectors.contiguous(), vectors.dtype

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def bytes(self) -> int:
        return self._vectors.nbytes

    def along(self, x: Tensor) -> Tensor:
        """Return x V^T (tokens x p)."""
        return torch.mm(x.to(self._dtype), self._vectors.to(self._dtype).mT)

    def back(self, t: Tensor) -> Tensor:
        """Return t V (tokens x n)."""
        return torch.mm(t, self._vectors.to(self._dtype))


class _EightBits(_Whole):
    """Singular vectors as integers of 8 bits with a scale for each, which a pass brings to the model's dtype."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(vectors)
        largest = vectors.float().abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        self._vectors = (vectors.float() / scale).round_().to(torch.int8)
        self._scale = scale[:, 0].to(self._dtype)

    @property
    def bytes(self) -> int:
        return super().bytes + self._scale.nbytes

    def along(self, x: Tensor) -> Tensor:
        return super().along(x) * self._scale

    def back(self, t: Tensor) -> Tensor:
        return super().back(t * self._scale)


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
            kept = _EightBits if eight_bits else _Whole
            self.left = kept(left(share.left).mT.to(like.device, like.dtype, copy=True))
            self.right = kept(right(share.right).to(like.device, like.dtype, copy=True))
        else:
            self.left, self.right = beside.left, beside.right
        self._core: Core = share.core
        assert share.core.values is not None
        # one row more, of zeros, which index -1 of a token of the base comes to
        self._values = torch.zeros(slots + 1, *share.core.values.shape, device=like.device)
        self._rows = torch.zeros(slots + 1, dtype=torch.bool, device=like.device)
        self.used: set[int] = set()

    @property
    def bytes(self) -> int:
        """Bytes of L, R and the values."""
        return self.left.bytes + self.right.bytes + self._values.nbytes

    def set(self, slot: int, share: Share) -> None:
        """Put an adapter's values into a slot."""
        assert share.core.values is not None
        self._values[slot].copy_(share.core.values)
        self._rows[slot] = True
        self.used.add(slot)

    def reset(self, slot: int) -> None:
        """Empty a slot."""
        if slot in self.used:
            self._values[slot] = 0
            self._rows[slot] = False
            self.used.discard(slot)

    def add(self, x: Tensor, y: Tensor, slots: Tensor) -> None:
        """Add to y (tokens x out) what the adapters of tokens make of x (tokens x in).

        Args:
            x: the layer's input.
            y: its output, written to.
            slots: the slot of each token's adapter (tokens), -1 for the base.
        """
        tokens = self._rows[slots].nonzero()[:, 0]
        if not len(tokens):
            return
        every = len(tokens) == len(slots)
        own = slots if every else slots[tokens]
        t = self._through_cores(self.right.along(x if every else x[tokens]), own)
        added = self.left.back(t).to(y.dtype)
        part = y[:, self.outputs]
        if every:
            part.add_(added)
        else:
            part.index_add_(0, tokens, added)

    def _through_cores(self, t: Tensor, slots: Tensor) -> Tensor:
        if isinstance(self._core, Diagonal):
            return t * self._values[slots].to(t.dtype)
        found = torch.empty(len(t), len(self.left), dtype=t.dtype, device=t.device)
        for slot in slots.unique().tolist():
            rows = slots == slot
            found[rows] = self._core.holding(self._values[slot].to(t.dtype)).apply(t[rows])
        return found


class LayerCores:
    """All that a layer of the engine has beside its LoRAs: bases by part of its output and kind."""

    def __init__(self) -> None:
        self.bounds: dict[tuple[int, Kind], Bound] = {}

    def bases(self, part: int) -> dict[str, Bound]:
        """Return what has the bases that are at hand for a part of the output, by their keys."""
        return {kind[0]: bound for (of, kind), bound in self.bounds.items() if of == part}

    def add(self, x: Tensor, y: Tensor, slots: Tensor) -> None:
        """Add to y (tokens x out), in place, what the adapters of tokens make of x (tokens x in)."""
        for bound in self.bounds.values():
            if bound.used:
                bound.add(x, y, slots)

    def reset(self, slot: int) -> None:
        """Empty a slot."""
        for bound in self.bounds.values():
            bound.reset(slot)

    def set(self, slot: int, part: int, shares: Mapping[Kind, Share]) -> None:
        """Put into a slot what an adapter has on a part of the layer's output; the bases must be bound."""
        for key, share in shares.items():
            self.bounds[part, key].set(slot, share)

"""The cores C of the update s L C R: identity, diagonal, banded, sparse and dense.

A core never becomes an out x in matrix.  Its `values` may carry a leading batch axis, so that every row of a
batch has a core of its own; `mix` makes such a batch from several adapters over one basis, whose cores add where
their `layout` is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectune.layers.functional import banded_product, sparse_product


def _per_row(values: Tensor, t: Tensor) -> Tensor:
    """Shape (batch, n) values so that they broadcast over the middle axes of t (batch, ..., n)."""
    if values.dim() == 1:
        return values
    return values.reshape(values.shape[0], *(1,) * (t.dim() - 2), values.shape[-1])


@dataclass(frozen=True)
class Identity:
    """C = I."""

    def apply(self, t: Tensor) -> Tensor:
        """Return t C^T for t (..., q)."""
        return t

    def transposed(self, t: Tensor) -> Tensor:
        """Return t C for t (..., p)."""
        return t


@dataclass(frozen=True)
class Diagonal:
    """C = diag(values), values (k) or (batch, k)."""

    values: Tensor

    @property
    def layout(self) -> tuple[Any, ...]:
        """Cores of the same layout over one basis add value by value."""
        return ("diagonal",)

    def apply(self, t: Tensor) -> Tensor:
        """Return t C^T for t (..., k)."""
        return t * _per_row(self.values.to(t.dtype), t)

    transposed = apply


@dataclass(frozen=True)
class Banded:
    """C_ij = 0 beyond |i - j| <= width; values (entries) hold the diagonals from -width to width, end to end."""

    values: Tensor
    size: int
    width: int

    @property
    def layout(self) -> tuple[Any, ...]:
        """Cores of the same layout over one basis add value by value."""
        return ("banded", self.width)

    def apply(self, t: Tensor) -> Tensor:
        """Return t C^T for t (..., size)."""
        return banded_product(t, _per_row(self.values.to(t.dtype), t), self.width, False)

    def transposed(self, t: Tensor) -> Tensor:
        """Return t C for t (..., size)."""
        return banded_product(t, _per_row(self.values.to(t.dtype), t), self.width, True)


@dataclass(frozen=True)
class Sparse:
    """C[rows, columns] = values, zero elsewhere; rows and columns are (entries) and frozen."""

    values: Tensor
    rows: Tensor
    columns: Tensor
    size: int

    @property
    def layout(self) -> tuple[Any, ...]:
        """Cores of the same layout over one basis add value by value."""
        return ("sparse",)

    def apply(self, t: Tensor) -> Tensor:
        """Return t C^T for t (..., size)."""
        return self._product(t, self.rows, self.columns)

    def transposed(self, t: Tensor) -> Tensor:
        """Return t C for t (..., size)."""
        return self._product(t, self.columns, self.rows)

    def _product(self, t: Tensor, to: Tensor, of: Tensor) -> Tensor:
        values = self.values.to(t.dtype)
        if values.dim() == 1:
            return sparse_product(t, values, to, of)
        return torch.stack([sparse_product(row, v, to, of) for row, v in zip(t, values, strict=True)])


@dataclass(frozen=True)
class Dense:
    """C = values, (p x q) or (batch, p, q)."""

    values: Tensor

    @property
    def layout(self) -> tuple[Any, ...]:
        """Cores of the same layout over one basis add value by value."""
        return ("dense",)

    def apply(self, t: Tensor) -> Tensor:
        """Return t C^T for t (..., q)."""
        return self._product(t, self.values.to(t.dtype).mT)

    def transposed(self, t: Tensor) -> Tensor:
        """Return t C for t (..., p)."""
        return self._product(t, self.values.to(t.dtype))

    def _product(self, t: Tensor, matrix: Tensor) -> Tensor:
        if matrix.dim() == 2:
            return t @ matrix
        rows = t.reshape(t.shape[0], math.prod(t.shape[1:-1]), t.shape[-1])
        return torch.bmm(rows, matrix).reshape(*t.shape[:-1], matrix.shape[-1])


Core = Identity | Diagonal | Banded | Sparse | Dense


def mix(cores: Sequence[Any], weights: Sequence[float | Tensor]) -> Any:
    """Add cores over one basis: values = sum_k weights_k values_k.

    Args:
        cores: cores of one layout, each with unbatched `values`.
        weights: for each core a number, or a tensor (batch) that gives every row a core of its own.
    """
    parts = [
        (w.reshape(-1, *(1,) * core.values.dim()) if isinstance(w, Tensor) else w) * core.values
        for core, w in zip(cores, weights, strict=True)
    ]
    return replace(cores[0], values=sum(parts[1:], parts[0]))

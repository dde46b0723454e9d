"""The cores C of the update s L C R: identity, diagonal, banded, sparse and dense.

A core never becomes an out x in matrix.  Its `values` may carry a leading batch axis, so that every row of a
batch has a core of its own; `mix` makes such a batch from several adapters over one basis, whose cores add where
their `layout` is the same.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.layers.core_ops import (
    band_entries,
    band_indices,
    banded_entries,
    banded_product,
    sparse_entries,
    sparse_product,
)
from spectune.private import is_transformed


def _per_row(values: Tensor, t: Tensor) -> Tensor:
    """Shape (batch, n) values so that they broadcast over the middle axes of t (batch, ..., n)."""
    if values.dim() == 1:
        return values
    return values.reshape(values.shape[0], *(1,) * (t.dim() - 2), values.shape[-1])


def _rows(t: Tensor, batch: Sequence[int]) -> Tensor:
    """Join the middle axes of t (..., k): (n, k), or (*batch, n, k) where every row of the batch has its own core."""
    return t.reshape(*batch, math.prod(t.shape[len(batch) : -1]), t.shape[-1])


C = TypeVar("C", bound="Core")


class Core(abc.ABC):
    """The contract of a core C (p x q): two products, their gradients, and how cores over one basis add.

    A subclass is a frozen dataclass; what trains is one tensor, its field `values`.  A leading axis (batch) before the
    shape that the class states gives every row of a batch a core of its own.  `spectune.testing.CoreContract`
    proves a core, given an example of it.
    """

    values: Tensor | None  # None where nothing trains

    def holding(self: C, values: Tensor | None) -> C:
        """Return the core with other values."""
        return replace(cast(Any, self), values=values)  # every core is a dataclass

    @property
    def layout(self) -> tuple[object, ...]:
        """Cores of the same layout over one basis add value by value."""
        return (type(self).__name__.lower(),)

    @property
    def diagonal(self) -> Tensor | None:
        """The values (q) or (batch, q) of a core that is nothing but a diagonal, which a kernel can fold in."""
        return None

    @abc.abstractmethod
    def apply(self, t: Tensor) -> Tensor:
        """Return t C^T (..., p) for t (..., q), in t's dtype."""

    @abc.abstractmethod
    def transposed(self, t: Tensor) -> Tensor:
        """Return t C (..., q) for t (..., p), in t's dtype."""

    @abc.abstractmethod
    def gradients(self, t: Tensor, grad: Tensor, of_values: bool) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of t (n, q) and, `of_values`, of the values, given that of t C^T (n, p)."""


def _in_full(t: Tensor, values: Tensor, rows: Tensor, columns: Tensor, transpose: bool) -> Tensor:
    """Return t C^T, or t C if `transpose`, by a matrix of all places, through which torch.func sees."""
    full = values.new_zeros(t.shape[-1], t.shape[-1]).index_put((rows.to(t.device), columns.to(t.device)), values)
    return t @ (full if transpose else full.mT)


@dataclass(frozen=True)
class Identity(Core):
    """C = I."""

    values = None

    def apply(self, t: Tensor) -> Tensor:
        return t

    def transposed(self, t: Tensor) -> Tensor:
        return t

    def gradients(self, t: Tensor, grad: Tensor, of_values: bool) -> tuple[Tensor, None]:
        return grad, None


IDENTITY = Identity()  # by name where torch.compile passes: PyTorch 2.9 traces no default that is an object


@dataclass(frozen=True)
class Diagonal(Core):
    """C = diag(values), values (k) or (batch, k)."""

    values: Tensor

    @property
    def diagonal(self) -> Tensor:
        return self.values

    def apply(self, t: Tensor) -> Tensor:
        return t * _per_row(self.values.to(t.dtype), t)

    transposed = apply

    def gradients(self, t: Tensor, grad: Tensor, of_values: bool) -> tuple[Tensor, Tensor | None]:
        return self.transposed(grad), (grad * t).sum(0) if of_values else None

    def plus(self, diagonal: Tensor) -> Diagonal:
        """Return C + diag(diagonal)."""
        return Diagonal(self.values + diagonal)


@dataclass(frozen=True)
class Banded(Core):
    """C_ij = 0 beyond |i - j| <= width; values (entries) hold the diagonals from -width to width, end to end."""

    values: Tensor
    size: int
    width: int

    @property
    def layout(self) -> tuple[object, ...]:
        """Cores of the same layout over one basis add value by value."""
        return ("banded", self.width)

    def apply(self, t: Tensor) -> Tensor:
        return self._product(t, False)

    def transposed(self, t: Tensor) -> Tensor:
        return self._product(t, True)

    def _product(self, t: Tensor, transpose: bool) -> Tensor:
        values = self.values.to(t.dtype)
        if is_transformed():
            return _in_full(t, values, *band_indices(self.size, self.width), transpose)
        return banded_product(_rows(t, values.shape[:-1]), values, self.width, transpose).reshape(t.shape)

    def gradients(self, t: Tensor, grad: Tensor, of_values: bool) -> tuple[Tensor, Tensor | None]:
        return self.transposed(grad), banded_entries(grad, t, self.width, False) if of_values else None

    def plus(self, diagonal: Tensor) -> Banded:
        """Return C + diag(diagonal)."""
        before = (band_entries(self.size, self.width) - self.size) // 2
        return replace(self, values=self.values + F.pad(diagonal, (before, before)))


@dataclass(frozen=True)
class Sparse(Core):
    """C[rows, columns] = values, zero elsewhere; rows and columns are (entries) and frozen."""

    values: Tensor
    rows: Tensor
    columns: Tensor
    size: int

    def apply(self, t: Tensor) -> Tensor:
        return self._product(t, self.rows, self.columns)

    def transposed(self, t: Tensor) -> Tensor:
        return self._product(t, self.columns, self.rows)

    def _product(self, t: Tensor, to: Tensor, of: Tensor) -> Tensor:
        values = self.values.to(t.dtype)
        if is_transformed():
            return _in_full(t, values, to, of, False)
        if values.dim() == 1:
            return sparse_product(t, values, to, of)
        return torch.stack([sparse_product(row, v, to, of) for row, v in zip(t, values, strict=True)])

    def gradients(self, t: Tensor, grad: Tensor, of_values: bool) -> tuple[Tensor, Tensor | None]:
        return self.transposed(grad), sparse_entries(grad, t, self.rows, self.columns) if of_values else None

    def plus(self, diagonal: Tensor) -> Sparse:
        """Return C + diag(diagonal)."""
        places = torch.arange(self.size, device=self.rows.device)
        rows, columns = torch.cat([self.rows, places]), torch.cat([self.columns, places])
        return Sparse(torch.cat([self.values, diagonal]), rows, columns, self.size)


@dataclass(frozen=True)
class Dense(Core):
    """C = values, (p x q) or (batch, p, q)."""

    values: Tensor

    def apply(self, t: Tensor) -> Tensor:
        return self._product(t, self.values.to(t.dtype).mT)

    def transposed(self, t: Tensor) -> Tensor:
        return self._product(t, self.values.to(t.dtype))

    def _product(self, t: Tensor, matrix: Tensor) -> Tensor:
        return (_rows(t, matrix.shape[:-2]) @ matrix).reshape(*t.shape[:-1], matrix.shape[-1])

    def gradients(self, t: Tensor, grad: Tensor, of_values: bool) -> tuple[Tensor, Tensor | None]:
        return self.transposed(grad), grad.mT @ t if of_values else None


def mix(cores: Sequence[C], weights: Sequence[float | Tensor]) -> C:
    """Add cores over one basis: values = sum_k weights_k values_k.

    Args:
        cores: cores of one layout, each with unbatched `values`.
        weights: for each core a number, or a tensor (batch) that gives every row a core of its own.
    """
    parts = []
    for core, w in zip(cores, weights, strict=True):
        assert core.values is not None  # or it would have nothing to add
        parts.append((w.reshape(-1, *(1,) * core.values.dim()) if isinstance(w, Tensor) else w) * core.values)
    return cores[0].holding(sum(parts[1:], parts[0]))

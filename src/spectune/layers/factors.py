"""One update s L C R and its product with an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from platform import machine
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from spectune.layers.cores import IDENTITY, Core
from spectune.layers.kinds import Vectors
from spectune.private import multiplies_bfloat16
from spectune.speed.dense import linear


class Base(NamedTuple):
    """What an update may ask of the frozen layer, without assuming how its weight is held.

    Args:
        output: () -> x W^T, without the bias, for the input at hand; in a forward pass (z) -> z W^T for another.
        project: R (q x in) -> W R^T (out x q).
        bias: (out), or None.
        rows: (indices (n)) -> rows of W (n x in), where they can be had.
        norms: () -> ||W_i|| (out) of the W that is there now; None where those of a basis are to be taken.
        seen: () -> tensors that are others, and not the same objects, once W has other values; None if nothing tells.
        owns: (key of a basis) -> whether the basis was made of the W that is there now.
    """

    output: Callable[..., Tensor]
    project: Callable[[Tensor], Tensor]
    bias: Tensor | None = None
    rows: Callable[[Tensor], Tensor] | None = None
    norms: Callable[[], Tensor] | None = None
    seen: Callable[[], Sequence[Tensor] | None] = tuple
    owns: Callable[[str], bool] = lambda key: True


class Ratio(NamedTuple):
    """What W + dW is multiplied by to give W'.

    Args:
        values: (out), by row.
        rows: indices (n) of rows that are not to be had as W x + dW x, which would cancel; None if there are none.
        sums: W + dW (n x in) in these rows.
    """

    values: Tensor
    rows: Tensor | None = None
    sums: Tensor | None = None


class Factors(NamedTuple):
    """The update dW = scale * left @ core @ right.

    Args:
        left: L (out x p).
        right: R (q x in).
        core: C (p x q).
        scale: s.
    """

    left: Tensor
    right: Tensor
    core: Core = IDENTITY
    scale: float = 1.0

    def apply(self, x: Tensor | Vectors) -> Tensor:
        """Return x dW^T for x (..., in), in x's dtype."""
        R = self.right.to(x.dtype)
        t = self.core.apply(x.product(R) if isinstance(x, Vectors) else F.linear(x, R))
        if isinstance(self.scale, Tensor) or self.scale != 1.0:  # not to look at a tensor, which waits
            t = t * self.scale
        left = self.left.to(x.dtype)
        return x.finish(t, left) if isinstance(x, Vectors) else F.linear(t, left)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add x dW^T (..., out) to y, in place and without gradients."""
        x = taken(x, self.right)
        add_product(y, self.core.apply(project(x, self.right)), self.left, self.scale)

    def dense(self) -> Tensor:
        """Return dW (out x in); for checks and merging, never in a training step."""
        return self.scale * (self.core.transposed(self.left) @ self.right)


_FEW = 32  # rows, of which a product in float32 takes no longer than one in 16 bits and the rounding of its factors


def taken(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x (..., in) in the dtype in which its product with a thin matrix is the fastest: x's own, or the matrix's.

    A processor casts a few rows sooner than a matrix, and without instructions for bfloat16 it takes float32 for many.
    """
    if x.dtype is matrix.dtype or x.device.type != "cpu" or x.dtype.itemsize > matrix.dtype.itemsize:
        return x
    return x.to(matrix.dtype) if x.numel() <= _FEW * x.shape[-1] or not _has_16_bits() else x


def project(x: Tensor, R: Tensor) -> Tensor:
    """Return x R^T (..., q), without gradients, for x (..., in) and R (q x in), in x's dtype."""
    R = R if R.dtype is x.dtype else R.to(x.dtype)
    return F.linear(x, R) if x.numel() <= _FEW * x.shape[-1] else linear(x, R)


def add_product(y: Tensor, u: Tensor, L: Tensor, scale: float) -> None:
    """Add scale * u L^T to y (..., out), in place, for u (..., p) and L (out x p)."""
    L = L if L.dtype is u.dtype else L.to(u.dtype)
    if u.dtype is y.dtype and y.is_contiguous():
        y.view(-1, L.shape[0]).addmm_(u.reshape(-1, L.shape[1]), L.mT, alpha=scale)
    else:
        y.add_(F.linear(u, L), alpha=scale)


@cache
def _has_16_bits() -> bool:
    """Whether this processor multiplies bfloat16."""
    return multiplies_bfloat16() or machine() in ("arm64", "aarch64")

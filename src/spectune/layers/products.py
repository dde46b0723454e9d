"""The products of an adapted layer with its thin factors: the reference for `spectune.layers.kernels.low_rank`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spectune.speed.dense import linear, matmul


class Middle(Protocol):
    """A core, as products see it: none of the cores, which are built on these modules, is imported here."""

    @property
    def diagonal(self) -> Tensor | None: ...
    def apply(self, t: Tensor) -> Tensor: ...


def factor(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor as the products take it."""
    return matrix.to(dtype)


def project(x: Tensor, R: Tensor, core: Middle | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return t = scale * x R^T (n x rank) and t C^T, for x (n x size) and R (rank x size); no core is C = I."""
    t = linear(x, R)
    if scale != 1:
        t *= scale
    return t, t if core is None else core.apply(t)


def add(
    y: Tensor, u: Tensor, L: Tensor, scale: float = 1.0, ratio: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return y (n x size), which becomes ratio * (y + scale * u L^T) + bias, for u (n x rank) and L (size x rank)."""
    return finish(y.addmm_(u, L.mT, alpha=scale), ratio, bias)


def finish(y: Tensor, ratio: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return y, which becomes ratio * y + bias."""
    if ratio is not None:
        _times(y, ratio, out=y)
    return y if bias is None else y.add_(bias)


def _times(y: Tensor, ratio: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ratio * y; in a shorter dtype ratio - 1 has digits left where a ratio near one has none."""
    if ratio.dtype == y.dtype:
        return torch.mul(y, ratio, out=out)
    return torch.addcmul(y, y, (ratio - 1).to(y.dtype), out=out)


def over_rows(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale * a^T b for a (n x k) and b (n x m), the thinner first in the product."""
    product = matmul(a.mT, b) if a.shape[1] <= b.shape[1] else matmul(b.mT, a).mT
    return product if scale == 1 else product * scale


def through_ratio(grad: Tensor, y: Tensor | None, bias: Tensor | None, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of z and, if y is given, of ratio, given that of y = ratio * z + bias."""
    to_ratio = None
    if y is not None:
        product = grad * (y if bias is None else y - bias)
        to_ratio = product.sum(0).to(ratio.dtype) / ratio  # summed in float32 whatever the dtype
    return _times(grad, ratio), to_ratio

"""One update s L C R and its product with an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from spectune.layers.cores import Core, Identity


class Base(NamedTuple):
    """What an update may ask of the frozen layer, without assuming how its weight is held.

    Args:
        output: () -> x W^T, without the bias, for the input at hand; in a forward pass (z) -> z W^T for another.
        project: R (q x in) -> W R^T (out x q).
        bias: (out), or None.
        rows: (indices (n)) -> rows of W (n x in), where they can be had.
    """

    output: Callable[..., Tensor]
    project: Callable[[Tensor], Tensor]
    bias: Tensor | None = None
    rows: Callable[[Tensor], Tensor] | None = None


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
    core: Core = Identity()
    scale: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """Return x dW^T for x (..., in), in x's dtype."""
        t = self.core.apply(F.linear(x, self.right.to(x.dtype)))
        if isinstance(self.scale, Tensor) or self.scale != 1.0:  # not to look at a tensor, which waits
            t = t * self.scale
        return F.linear(t, self.left.to(x.dtype))

    def dense(self) -> Tensor:
        """Return dW (out x in); for checks and merging, never in a training step."""
        return self.scale * (self.core.transposed(self.left) @ self.right)

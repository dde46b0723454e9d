"""Block Krylov iteration with Rayleigh-Ritz, for the dominant singular triplets of an operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectune.spectral._eigh import eigh

Product = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor], tuple[float, float]]


class Ritz(NamedTuple):
    """Approximate triplets as rows, the dominant first.

    Args:
        right: orthonormal rows v (rank x n).
        left: rows A v = s u (rank x m).
    """

    right: Tensor
    left: Tensor


def block_size(rank: int) -> int:
    """Return the rows of a block: the rank in eights, up to 32, where products reach full speed."""
    return min(32, -(-rank // 8) * 8)


def worthwhile(rank: int, n: int, share: int = 12) -> bool:
    """Whether the Krylov space for `rank` triplets will be small beside the n dimensions of an exact method."""
    return share * rank <= n and 18 * block_size(rank) <= n


def block_krylov(
    forward: Product,
    backward: Product,
    shape: tuple[int, int],
    rank: int,
    tol: float,
    measure: Measure | None,
    like: Tensor,
    seed: int,
) -> Ritz | None:
    """Return the `rank` dominant triplets of A (m x n) from the Krylov space of A^T A and a seeded normal block.

    The basis K grows by a block Q a step, orthogonalised twice against all of K; T = K A^T A K^T gives Ritz values
    theta and vectors.  With Z = Q A^T A - (its part in K), the residual of triplet i is ||z_i Z||, where z_i are
    the last block's entries of the eigenvector of T: it costs no product.  The looks at convergence come at a fixed
    sequence of dimensions, so that rounding seldom changes where the iteration ends.

    Args:
        forward: X (b x n) -> X A^T (b x m).
        backward: Y (b x m) -> Y A (b x n).
        shape: (m, n).
        rank: triplets wanted.
        tol: without `measure`, done when ||A^T u_i - s_i v_i|| <= tol s_i for all i.
        measure: theta -> (value, scale), the value rising with the Krylov space; done when the geometric series of
            the last two gains promises less than tol * scale to come.
        like: a tensor of the dtype and device to work in.
        seed: of the first block.

    Returns:
        The triplets, or None where the criterion was not reached.

    Reference:
        Musco and Musco, Randomized block Krylov methods, arXiv 1504.05477.
    """
    m, n = shape
    b = block_size(rank)
    # without `measure` a look takes eigenvectors, and is passed late
    look, growth = (max(3 * b, 2 * rank), 9 / 8) if measure is not None else (max(6 * b, 2 * rank), 5 / 4)
    # past six tenths of n the space costs more than an exact decomposition
    most = min(6 * n // 10, max(40 * b, 10 * rank)) // b * b
    space = _Space(like, (m, n), most, start(b, n, seed).to(like))
    seen: list[tuple[int, float]] = []
    for dim in range(b, most + 1, b):
        space.grow(forward, backward)
        # W has no more directions than the basis by now: its rank is low, and the space is complete
        dry = dim >= rank and space.least <= space.tiny
        if dim < look and not dry:
            continue
        look = growth * dim
        if measure is not None and not dry:
            value, scale = measure(torch.linalg.eigvalsh(space.projected)[-rank:])
            seen.append((dim // b, value))
            # the first looks cost eigenvalues alone; vectors are computed once, when the trend says that it is over
            if len(seen) < 3 or to_come(seen) > tol * scale:
                continue
        values, vectors = eigh(space.projected)
        values, vectors = values[-rank:], vectors[:, -rank:]
        if (measure is not None and not dry) or bool((space.residuals(vectors) <= tol * values).all()):
            return space.triplets(vectors)
        if dry:  # growing further would add rounding alone
            return None
    return None


class _Space:
    """A growing orthonormal basis K of the Krylov space of A^T A, with P = A K^T and T = K A^T A K^T.

    P is kept because the left vectors come from it at the end, without another product with W.

    Args:
        like: a tensor of the dtype and device to work in.
        shape: (m, n) of A.
        most: rows that there is room for.
        block: the first rows of the basis (b x n), orthonormal.

    Attributes:
        dim: rows of the basis.
        least: how much of the block that comes next is new, beside the largest value: nothing where W is used up.
        tiny: what rounding makes of nothing.
    """

    def __init__(self, like: Tensor, shape: tuple[int, int], most: int, block: Tensor) -> None:
        m, n = shape
        self._K, self._P, self._T = like.new_empty(most, n), like.new_empty(most, m), like.new_zeros(most, most)
        self._Q, self._R = block, like.new_zeros(0)
        self.dim, self.least = 0, 1.0
        self.tiny = 10 * torch.finfo(like.dtype).eps

    @property
    def projected(self) -> Tensor:
        """T: A^T A on the basis."""
        return self._T[: self.dim, : self.dim]

    def grow(self, forward: Product, backward: Product) -> None:
        """Take the next block into the basis, and make the one behind it."""
        old, self.dim = self.dim, self.dim + len(self._Q)
        self._K[old : self.dim] = self._Q
        self._P[old : self.dim] = Y = forward(self._Q)
        Z, basis = backward(Y), self._K[: self.dim]
        C = Z @ basis.mT
        # in exact arithmetic a block meets the two before it alone; with rounding it meets all, and T has to say so, or
        # its values are those of another basis
        self._T[old : self.dim, : self.dim] = C
        self._T[: self.dim, old : self.dim] = C.mT
        # twice, because one projection leaves what rounding has added, and a basis that is not orthogonal shows values
        # twice
        Z = Z - C @ basis
        Z = Z - (Z @ basis.mT) @ basis
        Q, self._R = torch.linalg.qr(Z.mT)
        self._Q = Q.mT.contiguous()
        self.least = float(self._R.diagonal().abs().min() / self._T.diagonal().max())
        # the block has nearly run out of directions: what QR makes of it is mostly rounding, which lies in the old ones
        # too
        if self.least < self.tiny**0.5:  # rounding is much of a row this short
            self._Q = torch.linalg.qr((self._Q - (self._Q @ basis.mT) @ basis).mT)[0].mT.contiguous()

    def residuals(self, vectors: Tensor) -> Tensor:
        """Return ||A^T A v - theta v|| for the vectors of T's columns: what the next block still holds of them."""
        return torch.linalg.vector_norm(self._R @ vectors[-len(self._Q) :], dim=0)

    def triplets(self, vectors: Tensor) -> Ritz:
        """Return the triplets of ascending eigenvectors of T, as columns."""
        rows = vectors.flip(1).mT
        return Ritz(rows @ self._K[: self.dim], rows @ self._P[: self.dim])


def to_come(seen: list[tuple[int, float]]) -> float:
    """Return what a rising value will still gain, given the last three (steps, value), if gains fall geometrically.

    Their ratio, a step, is taken as 0.95 at most.
    """
    (first, a), (second, b), (third, c) = seen[-3:]
    earlier, later = (b - a) / (second - first), (c - b) / (third - second)
    if later <= 0:
        return 0.0
    # a ratio near one would promise gains for ever, and two looks in the noise easily give one
    ratio = min((later / earlier) ** (2 / (third - first)), 0.95) if earlier > later else 0.95
    return later * ratio ** ((third - second - 1) / 2) * ratio / (1 - ratio)


def polish(right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate orthonormal rows V (r x n) and A V (r x m) so that the rows of the second are orthogonal, descending."""
    double = left.double()
    rotation = eigh(double @ double.mT)[1].flip(1).mT
    return (rotation @ right.double()).to(right.dtype), (rotation @ double).to(left.dtype)


@lru_cache(maxsize=32)
def start(b: int, n: int, seed: int) -> Tensor:
    """Return b orthonormal rows of length n from a generator that every platform and version draws alike."""
    drawn = np.random.RandomState(seed).standard_normal((b, n))
    return torch.linalg.qr(torch.from_numpy(drawn).mT)[0].mT.contiguous()

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
    # K holds the basis, P its products A K^T: the left vectors come from P at the end, without another product with W
    K, P, T = like.new_empty(most, n), like.new_empty(most, m), like.new_zeros(most, most)
    tiny = 10 * torch.finfo(like.dtype).eps
    Q = start(b, n, seed).to(like)
    seen: list[tuple[int, float]] = []
    for old in range(0, most, b):
        dim = old + b
        K[old:dim] = Q
        P[old:dim] = Y = forward(Q)
        Z, basis = backward(Y), K[:dim]
        C = Z @ basis.mT
        # in exact arithmetic a block meets the two before it alone; with rounding it meets all, and T has to say so, or
        # its values are those of another basis
        T[old:dim, :dim] = C
        T[:dim, old:dim] = C.mT
        # twice, because one projection leaves what rounding has added, and a basis that is not orthogonal shows values
        # twice
        Z = Z - C @ basis
        Z = Z - (Z @ basis.mT) @ basis
        Q, R = torch.linalg.qr(Z.mT)
        Q = Q.mT.contiguous()
        least = float(R.diagonal().abs().min() / T.diagonal().max())
        # the block has nearly run out of directions: what QR makes of it is mostly rounding, which lies in the old ones
        # too
        if least < tiny**0.5:  # rounding is much of a row this short
            Q = torch.linalg.qr((Q - (Q @ basis.mT) @ basis).mT)[0].mT.contiguous()
        # W has no more directions than the basis by now: its rank is low, and the space is complete
        dry = dim >= rank and least <= tiny
        if dim < look and not dry:
            continue
        look = growth * dim
        if measure is not None and not dry:
            value, scale = measure(torch.linalg.eigvalsh(T[:dim, :dim])[-rank:])
            seen.append((dim // b, value))
            # the first looks cost eigenvalues alone; vectors are computed once, when the trend says that it is over
            if len(seen) < 3 or to_come(seen) > tol * scale:
                continue
        values, vectors = eigh(T[:dim, :dim])
        values, vectors = values[-rank:], vectors[:, -rank:]
        residuals = torch.linalg.vector_norm(R @ vectors[old:], dim=0)
        if (measure is not None and not dry) or bool((residuals <= tol * values).all()):
            vectors = vectors.flip(1).mT
            return Ritz(vectors @ K[:dim], vectors @ P[:dim])
        if dry:
            return None
    return None


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

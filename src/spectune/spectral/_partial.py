"""The top and the bottom of a spectrum without the rest of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectune.spectral._exact import gram_part, tall_svd, times
from spectune.spectral._krylov import Product, block_krylov, polish, worthwhile
from spectune.spectral._types import Certify
from spectune.speed.dense import linear, matmul

Rows = tuple[Tensor, Tensor, Tensor]  # U^T (rank x m), S (rank), V^T (rank x k)
SMALLEST_PIVOT = 1e-7  # of the largest: bounds the inverse of a singular factor


def top(T: Tensor, rank: int, tol: float, certify: Certify, seed: int) -> Rows:
    """Return the `rank` largest triplets of a tall T (m x k), as rows.

    "span" is met when more blocks would raise the captured energy, sum s_i^2, by less than tol times that and less than
    tol times what is left, ||T||_F^2 - sum s_i^2: then ||T - T V V^T||_F is within a part tol / 2 of the least.
    """
    m, k = T.shape
    if worthwhile(rank, k):
        energy = float(torch.linalg.vector_norm(T)) ** 2

        def measure(theta: Tensor) -> tuple[float, float]:
            captured = float(theta.sum())
            return captured, min(captured, energy - captured)

        # who asks for the span does not wait for the vectors: where values are nearly equal they never settle, and any
        # of them capture the same
        wanted = measure if certify == "span" else None
        found = block_krylov(lambda X: linear(X, T), lambda Y: matmul(Y, T), (m, k), rank, tol, wanted, T, seed)
        rows = None if found is None else _normalized(*polish(*found))
        if rows is not None:
            return rows
    return _quick(T, slice(0, rank), tol) or exact(T, slice(0, rank))


def bottom(T: Tensor, rank: int, tol: float, certify: Certify, seed: int) -> Rows:
    """Return the `rank` smallest triplets of a tall T (m x k), as rows, in descending order.

    They are the dominant ones of the inverse of a factor of T.  "span" is met when more blocks would lower
    sum s_i^2 by less than tol of it.
    """
    m, k = T.shape
    part = slice(k - rank, k)
    if m > k and not worthwhile(rank, k):
        rows = _quick(T, part, tol)
        if rows is not None:
            return rows
    if k >= 256 and worthwhile(rank, k, share=6):
        # a square weight is ill-conditioned as a rule, and float32 then seldom passes
        for dtype in dict.fromkeys((torch.float64 if m == k else T.dtype, torch.float64)):
            like = T.to(dtype)
            rows = _inverse_krylov(T, factor(like), like, rank, tol, certify, seed)
            if rows is not None:
                return rows
    return exact(T, part)


def exact(T: Tensor, part: slice) -> Rows:
    """Return part of the full decomposition of a tall T (m x k), as rows."""
    U, S, V = tall_svd(T)
    return U[:, part].mT, S[part], V[:, part].mT


def rounding(T: Tensor) -> float:
    """Return the residual that is rounding alone: 16 eps ||T||_F / sqrt(k), and what denormal results leave."""
    norm = float(torch.linalg.vector_norm(T, dtype=torch.float64))
    limits = torch.finfo(T.dtype)
    return 16 * limits.eps * norm / T.shape[1] ** 0.5 + T.shape[1] * limits.tiny * limits.eps


def _quick(T: Tensor, part: slice, tol: float) -> Rows | None:
    """Return part of the decomposition from a Gram matrix in float32, where its residuals pass."""
    if T.dtype == torch.float64:
        return None
    rows = _normalized(*gram_part(T, part))
    if rows is None:
        return None
    U, S, V = rows
    # float32 squares away all below 1e-3 of the largest value; whether that is what was asked for is told by the
    # residual
    residuals = torch.linalg.vector_norm(U @ T - S[:, None] * V, dim=1)
    return (U, S, V) if bool((residuals <= tol * S).all()) else None


def _normalized(right: Tensor, left: Tensor) -> Rows | None:
    """Return triplets of right vectors v and T v, or None where one is zero, whose left vector T v does not tell."""
    S = torch.linalg.vector_norm(left, dim=1)
    tiny = torch.finfo(S.dtype).tiny
    return (left / S[:, None], S, right) if bool((tiny <= S).all()) else None


class Inverse(NamedTuple):
    """Products with the inverse of a k x k factor A of a tall T, and A's left vectors as T's.

    Args:
        forward: X (b x k) -> X A^-1.
        backward: Y (b x k) -> Y A^-T.
        lift: U_A^T (b x k) -> U_T^T (b x m).
    """

    forward: Product
    backward: Product
    lift: Product


def factor(T: Tensor) -> Inverse:
    """Factor a tall T: P L U where it is square, else Q R; a pivot below 1e-7 of the largest is raised to that."""
    m, k = T.shape
    if m == k:
        LU, pivots, _ = torch.linalg.lu_factor_ex(T)
        _raise_pivots(LU)
        return Inverse(
            lambda X: torch.linalg.lu_solve(LU, pivots, X, left=False),
            lambda Y: torch.linalg.lu_solve(LU, pivots, Y, left=False, adjoint=True),
            lambda U: U,
        )
    reflectors, tau = torch.geqrf(T)
    R = reflectors[:k].triu()
    _raise_pivots(R)
    return Inverse(
        lambda X: torch.linalg.solve_triangular(R, X, upper=True, left=False),
        lambda Y: torch.linalg.solve_triangular(R.mT, Y, upper=False, left=False),
        lambda U: torch.ormqr(reflectors, tau, torch.cat([U.mT, U.new_zeros(m - k, len(U))])).mT,
    )


def _raise_pivots(triangle: Tensor) -> None:
    diagonal = triangle.diagonal()
    # raised and not refused: a weight that lost its rank is common, and the triplets are checked with T itself
    least = SMALLEST_PIVOT * diagonal.abs().max()
    diagonal.copy_(torch.where(diagonal.abs() >= least, diagonal, torch.where(diagonal < 0, -least, least)))


def _inverse_krylov(
    T: Tensor, A: Inverse, like: Tensor, rank: int, tol: float, certify: Certify, seed: int
) -> Rows | None:
    """Return the smallest triplets of a tall T (m x k), or None where they do not pass.

    The Ritz vectors take one more inverse step, which damps what they hold of the large triplets by (s / s_j)^2.
    The left vectors come from an inverse step too: T v / s would magnify the rounding of v by S_0 / s.  Then comes a
    Rayleigh-Ritz step with T itself, U^T T V, in float64.
    """
    k = T.shape[1]

    def measure(theta: Tensor) -> tuple[float, float]:
        energy = float((1 / theta).sum())
        return -energy, energy

    found = block_krylov(A.forward, A.backward, (k, k), rank, tol, measure if certify == "span" else None, like, seed)
    if found is None:
        return None
    # the factor of a weight that is nearly singular has its smallest pivots raised, so that its inverse is not exactly
    # T's: what it finds is a start, and the last word is T's own
    V = torch.linalg.qr(A.backward(A.forward(found.right)).mT)[0]
    U = torch.linalg.qr(A.forward(V.mT.contiguous()).mT)[0]
    U, V = A.lift(U.mT).double(), V.double()
    TV = times(T, V)
    rotate_U, S, rotate_V = torch.linalg.svd(U @ TV)
    U, V = rotate_U.mT @ U, rotate_V @ V.mT
    worst = torch.maximum(
        torch.linalg.vector_norm(rotate_V @ TV.mT - S[:, None] * U, dim=1),
        torch.linalg.vector_norm(times(T.mT, U.mT).mT - S[:, None] * V, dim=1),
    )
    if certify == "span":
        passed = worst <= (0.1 * S).clamp_min(4 * rounding(T))
    else:
        passed = worst <= (tol * S).clamp_min(rounding(T))
    return (U, S, V) if bool(passed.all()) else None

"""The decompositions of one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spectune.spectral._exact import eigen, minus_gram
from spectune.spectral._partial import bottom, exact, top
from spectune.spectral._types import SVD, Certify, OneSided, Which, check_criterion, check_rank, checked, signs
from spectune.speed.dense import exact_float32


def svd(
    W: Tensor,
    rank: int | None = None,
    which: Which = "full",
    tol: float = 1e-4,
    *,
    certify: Certify = "span",
    seed: int = 0,
) -> SVD:
    """Return singular triplets of a weight: W = U diag(S) Vh, all of them or the largest or smallest `rank`.

    The top comes from block Krylov iteration, the bottom from the same on the inverse of an LU or QR factor, all
    triplets, and whatever those cannot settle, from the eigenproblem of the smaller side's Gram matrix in float64.
    The sign of a triplet is such that the largest entry of v in magnitude is positive.  The same W and arguments give
    the same result up to rounding, whatever the global random state, which is left alone.

    Args:
        W: weight (out x in), on any device; float16 and bfloat16 are raised to float32.
        rank: triplets to compute, at most min(out, in); None with which="full".
        which: "full", "top" (largest) or "bottom" (smallest).
        tol: relative tolerance of `certify`; 0 computes top and bottom exactly.
        certify: what to iterate until.  "span": more steps would, by the trend of the last ones, change the energy
            inside the span, ||W V||_F^2, and for the top that outside, ||W - W V V^T||_F^2, by less than a part tol;
            single vectors of a dense cluster may then be mixed with neighbours of almost equal S.
            "residual": ||W^T u_i - s_i v_i|| <= tol s_i and ||W v_i - s_i u_i|| <= tol s_i for every i, as far as
            rounding lets them.  Where the criterion is not reached, the exact method takes over.
        seed: of the first Krylov block.

    Returns:
        U (out x k), S (k, descending) and Vh (k x in), float64 where W is and float32 otherwise, on W's device.

    Raises:
        SpectuneError: W is no matrix of finite floating-point values, or the rank does not fit.

    References:
        Musco and Musco, arXiv 1504.05477 (block Krylov); Halko, Martinsson and Tropp, arXiv 0909.4061.
    """
    W, largest = checked(W)
    k = check_rank(rank, which, W.shape)
    check_criterion(tol, certify)
    if largest == 0:
        return _of_zero(W, k)
    tall = W.shape[0] >= W.shape[1]
    scale = _scale(largest)
    T = _scaled(W if tall else W.mT, scale)
    with full_precision(W):
        if which == "full" or tol == 0 or k == min(W.shape):
            U, S, V = exact(T, slice(-k, None) if which == "bottom" else slice(0, k))
        else:
            U, S, V = (top if which == "top" else bottom)(T, k, tol, certify, seed)
    U, V = (U, V) if tall else (V, U)
    # a decomposition determines the sign of a triplet as little as its order: fixed here, factors of adapters that were
    # trained apart can be added
    sign = signs(V)[:, None]
    U, V = U.to(W.dtype) * sign.to(W.dtype), V.to(W.dtype) * sign.to(W.dtype)
    return SVD(U.mT.contiguous(), (S * scale).to(W.dtype), V.contiguous())


def one_sided(W: Tensor) -> OneSided:
    """Return W = L R with the singular vectors of one side only: U S and V^T, or U and S V^T where in > out.

    V and S^2 are the eigenpairs of W^T W (W W^T where in > out) in float64, and L = W V (R = U^T W), so that W = L R
    to rounding whatever the spectrum.  S is off by up to 1e-8 of its largest value, where that is above W's rounding.

    Args:
        W: weight (out x in), on any device; float16 and bfloat16 are raised to float32.

    Returns:
        L (out x k), R (k x in) and S (k, descending), k = min(out, in), float64 where W is and float32 otherwise.

    Raises:
        SpectuneError: W is no matrix of finite floating-point values.
    """
    W, largest = checked(W)
    tall = W.shape[0] >= W.shape[1]
    if largest == 0:
        U, S, Vh = _of_zero(W, min(W.shape))
        return OneSided(U * S, Vh, S) if tall else OneSided(U, S[:, None] * Vh, S)
    scale = _scale(largest)
    T = _scaled(W if tall else W.mT, scale)
    with full_precision(W):
        V = eigen(T)[1].to(W.dtype)
        product = T @ V
    S = torch.linalg.vector_norm(product, dim=0, dtype=torch.float64)
    S, order = S.sort(descending=True, stable=True)
    sign = signs((V if tall else product).mT)[order]
    V, product = V[:, order] * sign, product[:, order] * (sign * scale)
    S, V, product = (S * scale).to(W.dtype), V.to(W.dtype), product.to(W.dtype)
    if tall:
        return OneSided(product.contiguous(), V.mT.contiguous(), S)
    return OneSided(V.contiguous(), product.mT.contiguous(), S)


def singular_values(W: Tensor | Callable[[], Tensor]) -> Tensor:
    """Return S of a weight: the square roots of the eigenvalues of the smaller side's Gram matrix in float64.

    The error of S_i is about 1e-16 S_0^2 / S_i.  Beside W in float32, memory holds two matrices of min(out, in)^2 in
    float64; of a W that a function returns, nothing is held any more by the time of the second.

    Args:
        W: weight (out x in), on any device, or a function that returns it; float16 and bfloat16 are raised to float32.

    Returns:
        S (min(out, in), descending), float64.

    Raises:
        SpectuneError: W is no matrix of finite floating-point values.
    """
    gram, scale = _scaled_gram(W)
    return torch.linalg.eigvalsh(gram).neg_().clamp_min_(0).sqrt_() * scale


def _scaled_gram(W: Tensor | Callable[[], Tensor]) -> tuple[Tensor, float]:
    W, largest = checked(W() if callable(W) else W)
    scale = _scale(largest) if largest else 1.0
    return minus_gram(_scaled(W if W.shape[0] >= W.shape[1] else W.mT, scale)), scale


@contextmanager
def full_precision(W: Tensor) -> Iterator[None]:
    """Within the context products of float32 are products of float32: no autocast, no TF32, no bfloat16."""
    with exact_float32(), torch.no_grad(), torch.autocast(W.device.type, enabled=False):
        yield


def _scale(largest: float) -> float:
    """Return the power of two to divide W by, so that squares of its entries neither overflow nor vanish."""
    return 1.0 if 2.0**-30 < largest < 2.0**30 else 2.0 ** math.floor(math.log2(largest))


def _scaled(T: Tensor, scale: float) -> Tensor:
    return T if scale == 1.0 else (T.double() / scale).to(T.dtype)


def _of_zero(W: Tensor, k: int) -> SVD:
    eye = torch.eye(max(W.shape), k, dtype=W.dtype, device=W.device)
    return SVD(eye[: W.shape[0]].clone(), W.new_zeros(k), eye[: W.shape[1]].mT.contiguous())

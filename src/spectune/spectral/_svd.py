"""The decompositions of one matrix, and their certificate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectune.spectral._exact import eigen, tall_svd, times
from spectune.spectral._partial import Rows, bottom, top
from spectune.spectral._types import SVD, Certify, OneSided, Which, check_rank, checked, signs


def svd(
    W: Tensor,
    rank: int | None = None,
    which: Which = "full",
    tol: float = 1e-4,
    *,
    certify: Certify = "span",
    seed: int = 0,
) -> SVD:
    k = check_rank(rank, which, W.shape)
    W, largest = checked(W)
    tall = W.shape[0] >= W.shape[1]
    if largest == 0:
        return _zero(W, k)
    T = _scaled(W if tall else W.mT, largest)
    if which == "full" or k > min(W.shape) // 2:
        U, S, V = tall_svd(T)
        part = slice(len(S) - k, len(S)) if which == "bottom" else slice(0, k)
        rows: Rows = (U[:, part].mT, S[part], V[:, part].mT)
    elif which == "top":
        rows = top(T, k, tol, certify, seed)
    else:
        rows = bottom(T, k, tol, certify, seed)
    U, S, V = rows
    if not tall:
        U, V = V, U
    sign = signs(V)[:, None]
    scale = _scale(largest)
    return SVD((U * sign).mT.to(W.dtype).contiguous(), (S * scale).to(W.dtype), (V * sign).to(W.dtype).contiguous())


def one_sided(W: Tensor) -> OneSided:
    W, largest = checked(W)
    tall = W.shape[0] >= W.shape[1]
    if largest == 0:
        U, S, Vh = _zero(W, min(W.shape))
        return OneSided(U * S, Vh, S) if tall else OneSided(U, S[:, None] * Vh, S)
    T = _scaled(W if tall else W.mT, largest)
    S, V = eigen(T)
    product = times(T, V)
    S = torch.linalg.vector_norm(product, dim=0)
    S, order = S.sort(descending=True, stable=True)
    product, V = product[:, order], V[:, order]
    sign = signs((V if tall else product).mT)
    scale = _scale(largest)
    product, V, S = (product * (sign * scale)).to(W.dtype), (V * sign).to(W.dtype), (S * scale).to(W.dtype)
    if tall:
        return OneSided(product.contiguous(), V.mT.contiguous(), S)
    return OneSided(V.contiguous(), product.mT.contiguous(), S)


class Certificate(NamedTuple):
    residual: float


def certificate(W: Tensor, decomposition: SVD) -> Certificate:
    return Certificate(0.0)


def _scale(largest: float) -> float:
    """Return the power of two by which W is divided, so that its square neither overflows nor vanishes."""
    return 1.0 if 2.0**-30 < largest < 2.0**30 else float(2.0 ** torch.tensor(largest).double().log2().floor())


def _scaled(T: Tensor, largest: float) -> Tensor:
    scale = _scale(largest)
    return T if scale == 1.0 else (T.double() / scale).to(T.dtype)


def _zero(W: Tensor, k: int) -> SVD:
    return SVD(W.new_zeros(W.shape[0], k).fill_diagonal_(1), W.new_zeros(k), W.new_zeros(k, W.shape[1]).fill_diagonal_(1))

"""Exact decompositions from the symmetric eigenproblem of the smaller side, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.spectral._krylov import polish

CHUNK = 1 << 22  # entries of W raised to float64 at a time
TAIL = 1e-4  # below this part of the largest singular value, the Gram matrix does not settle the left vectors


def eigen(T: Tensor) -> tuple[Tensor, Tensor]:
    """Return S (k, descending) and V (k x k, columns) of a tall T (m x k): eigenpairs of T^T T in float64.

    The error of S_i is about 1e-16 S_0^2 / S_i: 1e-8 of the largest at the very bottom.
    """
    values, vectors = torch.linalg.eigh(gram(T))
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def gram(T: Tensor) -> Tensor:
    """Return T^T T (k x k) in float64, raising a few rows at a time."""
    total = T.new_zeros(T.shape[1], T.shape[1], dtype=torch.float64)
    for rows in _chunks(T):
        double = rows.double()
        total.addmm_(double.mT, double)
    return total


def times(T: Tensor, V: Tensor) -> Tensor:
    """Return T V in float64, raising a few rows of T at a time."""
    return torch.cat([rows.double() @ V for rows in _chunks(T)])


def _chunks(T: Tensor) -> tuple[Tensor, ...]:
    return T.split(max(1, CHUNK // T.shape[1]))


def tall_svd(T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m x k), S (k), V (k x k) of a tall T (m x k), m >= k, in float64.

    U = T V / S, where S_i is above 1e-4 of the largest.  The rest, few in a weight matrix, are found again by an SVD
    of T V_tail, which the head's left vectors are projected out of: it works at the tail's own scale, and its left
    vectors stay orthonormal where singular values are zero.
    """
    if T.dtype == torch.float64:
        U, S, Vh = torch.linalg.svd(T, full_matrices=False)
        return U, S, Vh.mT
    S, V = eigen(T)
    head = int((TAIL * S[0] < S).sum())
    U = times(T, V)
    U[:, :head] /= S[:head]
    if head < len(S):
        first = U[:, :head]
        tail, S[head:], rotation = torch.linalg.svd(_without(U[:, head:], first), full_matrices=False)
        V[:, head:] = V[:, head:] @ rotation.mT
        for _ in range(2):
            tail, R = torch.linalg.qr(_without(tail, first))
            tail = tail * torch.where(R.diagonal() < 0, -1.0, 1.0)
        U[:, head:] = tail
    return U, S, V


def _without(columns: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
    return columns


def gram_part(T: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return rows V (rank x k) and T V (rank x m) of part of the triplets, from the Gram matrix in T's own dtype.

    Half the time of float64, and good to 6e-8 (S_0 / S_i)^2 in float32: for a part that is near the head.
    """
    V = torch.linalg.eigh(T.mT @ T)[1].flip(1)[:, part].mT.contiguous()
    return polish(V, V @ T.mT)

"""Exact decompositions from the symmetric eigenproblem of the smaller side, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.spectral._eigh import eigh
from spectune.spectral._krylov import polish, start

CHUNK = 1 << 20  # entries of W raised to float64 at a time
PANELS = 4  # of columns of a Gram matrix, of which eigh reads the lower triangle
TAIL = 1e-4  # below this part of the largest singular value, the Gram matrix does not settle the left vectors


def eigen(T: Tensor) -> tuple[Tensor, Tensor]:
    """Return S (k, descending) and V (k x k, columns) of a tall T (m x k): eigenpairs of T^T T in float64.

    The error of S_i is about 1e-16 S_0^2 / S_i: 1e-8 of the largest at the very bottom.
    """
    values, vectors = eigh(minus_gram(T))
    return values.neg_().clamp_min_(0).sqrt_(), vectors


def minus_gram(T: Tensor) -> Tensor:
    """Return the lower block triangle of -T^T T (k x k) in float64, raising a few rows at a time.

    The eigenvalues of the negative come with the largest singular value first.
    """
    k = T.shape[1]
    total = T.new_zeros(k, k, dtype=torch.float64)
    panels = [slice(i * k // PANELS, (i + 1) * k // PANELS) for i in range(PANELS)]
    # W itself is never there in float64, which would be twice its size; eigh reads one triangle, so the other is left
    # zero
    for rows in _chunks(T):
        double = rows.double()
        for panel in panels:
            total[panel.start :, panel].addmm_(double[:, panel.start :].mT, double[:, panel], alpha=-1)
    return total


def times(T: Tensor, V: Tensor) -> Tensor:
    """Return T V in float64, raising a few rows of T at a time."""
    return torch.cat([rows.double() @ V for rows in _chunks(T)])


def _chunks(T: Tensor) -> tuple[Tensor, ...]:
    return T.split(max(1, CHUNK // T.shape[1]))


def tall_svd(T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m x k) in T's dtype, S (k) and V (k x k) in float64, of a tall T (m x k), m >= k.

    U = T V / S, where S_i is above 1e-4 of the largest.  The rest, few in a weight matrix, are found again by an SVD
    of T V_tail, which the head's left vectors are projected out of: it works at the tail's own scale, and its left
    vectors stay orthonormal where singular values are zero.
    """
    if T.dtype == torch.float64:
        U, S, Vh = torch.linalg.svd(T, full_matrices=False)
        return U, S, Vh.mT
    S, V = eigen(T)
    # the Gram matrix squares S: in the tail T V / S divides what is left of rounding in T V by a value that is rounding
    # too
    head = int((TAIL * S[0] < S).sum())
    scaled = V[:, :head] / S[:head]
    U = T.new_empty(T.shape[0], len(S))
    for rows, into in zip(_chunks(T), _chunks(U), strict=True):
        # summed in float64 and then rounded, a few rows at a time: U is as good as T's dtype can say, and no second U
        # is held
        into[:, :head] = rows.double() @ scaled
    if head < len(S):
        first = U[:, :head].double()
        tail, S[head:], rotation = torch.linalg.svd(_without(times(T, V[:, head:]), first), full_matrices=False)
        V[:, head:] = V[:, head:] @ rotation.mT
        U[:, head:] = _completed(tail, first)
    return U, S, V


def _completed(columns: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal columns, orthogonal to the basis; those that lie in it, as of zeros, are drawn anew."""
    columns, R = _orthonormal(_without(columns, basis))
    lost = R.abs() < 0.5
    # of singular values that are zero any completion will do, but it must be the same one every time
    columns[:, lost] = start(len(lost), len(columns), 1).mT.to(columns)[:, lost]
    for _ in range(2):
        columns = _orthonormal(_without(columns, basis))[0]
    return columns


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q of a QR factorization with its signs chosen to be near the columns, and R's diagonal."""
    Q, R = torch.linalg.qr(columns)
    diagonal = R.diagonal()
    return Q * torch.where(diagonal < 0, -1.0, 1.0), diagonal


def _without(columns: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
    return columns


def gram_part(T: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return rows V (rank x k) and T V (rank x m) of part of the triplets, from the Gram matrix in T's own dtype.

    Half the time of float64, and good to 6e-8 (S_0 / S_i)^2 in float32: for a part that is near the head.
    """
    V = eigh((T.mT @ T).neg_())[1][:, part].mT.contiguous()
    return polish(V, V @ T.mT)

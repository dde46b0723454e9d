"""Eigenvectors of symmetric matrices, where LAPACK's divide and conquer breaks down too."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (..., n, ascending) and vectors (..., n x n, columns) of symmetric matrices.

    Some builds of LAPACK answer with NaN, or with none at all, for matrices with many equal eigenvalues (all ones, say)
    that others take.  Such a matrix is taken again as Q^T A Q, whose entries have no such pattern.

    Args:
        A: (..., n x n), of which the lower triangle is read.

    Raises:
        torch.linalg.LinAlgError: not even then, as where A is not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(A)
        if bool(torch.isfinite(vectors).all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    whole = A.tril() + A.tril(-1).mT
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(A.shape[-1], A.shape[-1], generator=generator, dtype=torch.float64))[0].to(A)
    values, vectors = torch.linalg.eigh(Q.mT @ whole @ Q)
    return values, Q @ vectors

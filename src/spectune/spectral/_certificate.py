"""What a decomposition is worth, found out from the weight itself."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spectune.spectral._exact import tall_svd, times
from spectune.spectral._krylov import to_come
from spectune.spectral._partial import factor, rounding
from spectune.spectral._svd import full_precision
from spectune.spectral._types import SVD, checked


class Certificate(NamedTuple):
    """The errors of an SVD, found a posteriori in float64.

    Args:
        residuals: max(||W v_i - s_i u_i||, ||W^T u_i - s_i v_i||) for every triplet (k), in the units of W.
        residual: the largest of residuals / S; infinite where a triplet with s_i = 0 has one.
        orthogonality: the largest entry of |U^T U - I| and |V^T V - I|.
        error: ||W - U S Vh||_F / ||W||_F.
        excess: how far the energy inside the span, ||W V||_F^2, is from the largest that a span of its rank holds, or
            the smallest for the bottom, extrapolated from two more Krylov steps; as a part of it and of the energy
            outside, whichever is larger (for the bottom, as a part of it).  0 for a full decomposition.
        floor: the residual that rounding of the vectors leaves, in the units of W.
        S: singular values (k), for `met`.
    """

    residuals: Tensor
    residual: float
    orthogonality: float
    error: float
    excess: float
    floor: float
    S: Tensor

    def met(self, tol: float = 1e-4) -> Literal["residual", "rounding", "span", "neither"]:
        """Return the strictest criterion that holds.

        "residual": all residuals are at most tol s_i; "rounding": at most that or the floor; "span": the excess is at
        most tol.
        """
        if bool((self.residuals <= tol * self.S).all()):
            return "residual"
        if bool((self.residuals <= (tol * self.S).clamp_min(self.floor)).all()):
            return "rounding"
        return "span" if self.excess <= tol else "neither"


def certificate(W: Tensor, decomposition: SVD, which: Literal["top", "bottom"] = "top") -> Certificate:
    """Measure a decomposition against its weight: residuals, orthogonality and projection error.

    Args:
        W: weight (out x in).
        decomposition: of W: U (out x k), S (k), Vh (k x in).
        which: end of the spectrum that it is to hold; makes no difference to a full one.

    Returns:
        The certificate, on W's device.

    Raises:
        SpectuneError: W is no matrix of finite floating-point values.
    """
    W, _ = checked(W)
    U, S, V = (tensor.to(W.device, torch.float64) for tensor in decomposition)
    V = V.mT
    with full_precision(W):
        WV, WtU = times(W, V), times(W.mT, U)
        residuals = torch.maximum(
            torch.linalg.vector_norm(WV - U * S, dim=0), torch.linalg.vector_norm(WtU - V * S, dim=0)
        )
        eye = torch.eye(len(S), dtype=torch.float64, device=W.device)
        orthogonality = max(float((X.mT @ X - eye).abs().max()) for X in (U, V))
        energy = float(torch.linalg.vector_norm(W, dtype=torch.float64)) ** 2
        # ||W - U S V^T||^2 by its parts, so that no second matrix of W's size is made
        lost = energy - 2 * float((WV * U * S).sum()) + float(((U.mT @ U) * (V.mT @ V) * torch.outer(S, S)).sum())
        tall = W.shape[0] >= W.shape[1]
        excess = _excess(W if tall else W.mT, V if tall else U, energy, which)
    relative = torch.where(residuals > 0, residuals / S, 0.0)
    error = (max(lost, 0.0) / energy) ** 0.5 if energy else 0.0
    floor = rounding(W if tall else W.mT)
    return Certificate(residuals, float(relative.max()), orthogonality, error, excess, floor, S)


def _excess(T: Tensor, V: Tensor, energy: float, which: str) -> float:
    """Return how far the energy of span V (k x rank) is from the extreme, as a part of what is outside or inside."""
    k, rank = V.shape
    if rank == k or energy == 0:
        return 0.0
    basis = torch.linalg.qr(V)[0]
    inside = float(times(T, basis).square().sum())
    if 3 * rank > k or (which == "bottom" and k < 256):
        S = tall_svd(T.double())[1]
        best = float((S[:rank] if which == "top" else S[-rank:]).square().sum())
        least = min(best, energy - best) if which == "top" else best
        return abs(best - inside) / least if least > 0 else 0.0
    if which == "top":

        def product(K: Tensor) -> Tensor:
            return times(T.mT, times(T, K))
    else:
        A = factor(T.double())

        def product(K: Tensor) -> Tensor:
            return A.backward(A.forward(K.mT)).mT

    # the certificate goes on iterating where the decomposition ended: what two more steps gain says what is still
    # missing
    values = []
    for _ in range(3):
        H = product(basis)
        theta = torch.linalg.eigvalsh(basis.mT @ H)[-rank:]
        values.append(float(theta.sum()) if which == "top" else -float((1 / theta).sum()))
        more = H[:, -rank:]
        for _ in range(2):
            more = torch.linalg.qr(more - basis @ (basis.mT @ more))[0]
        basis = torch.cat([basis, more], dim=1)
    least = min(values[-1], energy - values[-1]) if which == "top" else -values[-1]
    first = inside if which == "top" else -inside
    return max(values[-1] - first + to_come(list(enumerate(values))), 0.0) / least if least > 0 else 0.0

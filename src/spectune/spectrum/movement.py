"""What a fine-tuned update did to a weight's singular values and vectors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectune.spectral import singular_values, svd

PARTS = 10  # of the spectrum, from the top, whose change is told one by one


class Movement(NamedTuple):
    """What dW did to W.

    Args:
        relative_norm: ||dW||_F / ||W||_F.
        update_rank: fewest singular values of dW that hold 99% of its energy.
        shift: for each tenth of the spectrum, from the top, ||S'|| / ||S|| - 1.
        intruders: how many of the first `top` left singular vectors of W + dW have no |cosine| >= epsilon with any
            of W's.
        intruder_places: which, from 1.
        top_overlap: of dW's leading subspace with W's top one, 0 to 1: ||U_r^T dU_r||_F^2 / r, the mean of both sides.
        bottom_overlap: with W's bottom one.
        chance: what a random subspace would overlap.
        overlap_rank: r, the update's rank and at most a quarter of min(out, in).
        after: S', the singular values of W + dW, descending.

    References:
        Shuttleworth et al., arXiv 2410.21228 (intruder dimensions); Hu et al., arXiv 2106.09685 (subspace overlap).
    """

    relative_norm: float
    update_rank: int
    shift: list[float]
    intruders: int
    intruder_places: list[int]
    top_overlap: float | None
    bottom_overlap: float | None
    chance: float | None
    overlap_rank: int
    after: np.ndarray


def movement(W: Tensor, dW: Tensor, top: int = 10, epsilon: float = 0.5) -> Movement:
    """Compare the decompositions of W and W + dW.

    Args:
        W: weight (out x in); 16 bits are raised to float32.
        dW: update (out x in).
        top: leading vectors of W + dW that are looked at.
        epsilon: a vector whose largest |cosine| with those of W is below this is an intruder.

    Raises:
        SpectuneError: either holds values that are not finite.
    """
    W, dW = W.detach().float(), dW.detach().float()
    U, S, Vh = svd(W)
    k = len(S)
    top = min(top, k)
    changed = W + dW
    after = singular_values(changed).cpu().numpy()
    leading = svd(changed, top, "top", tol=0).U
    nearest = (U.mT @ leading).abs().amax(0)
    places = (torch.nonzero(nearest < epsilon).flatten() + 1).tolist()
    energy = singular_values(dW).square().cumsum(0)
    rank, r, overlaps = 0, 0, (None, None, None)
    if energy[-1] > 0:
        rank = int((energy < 0.99 * energy[-1]).sum()) + 1
        r = min(rank, max(1, k // 4))
        dU, _, dVh = svd(dW, r, "top")
        overlaps = (
            (_overlap(U[:, :r], dU) + _overlap(Vh[:r].mT, dVh.mT)) / 2,
            (_overlap(U[:, -r:], dU) + _overlap(Vh[-r:].mT, dVh.mT)) / 2,
            (r / W.shape[0] + r / W.shape[1]) / 2,
        )
    norm = torch.linalg.vector_norm(W, dtype=torch.float64)
    return Movement(
        relative_norm=float(torch.linalg.vector_norm(dW, dtype=torch.float64) / norm) if norm else 0.0,
        update_rank=rank,
        shift=_shift(S.double().cpu().numpy(), after),
        intruders=len(places),
        intruder_places=places,
        top_overlap=overlaps[0],
        bottom_overlap=overlaps[1],
        chance=overlaps[2],
        overlap_rank=r,
        after=after,
    )


def _overlap(A: Tensor, B: Tensor) -> float:
    return float((A.mT @ B).square().sum() / B.shape[1])


def _shift(before: np.ndarray, after: np.ndarray) -> list[float]:
    parts = zip(np.array_split(before, PARTS), np.array_split(after, PARTS), strict=True)
    norms = [(float(np.linalg.norm(a)), float(np.linalg.norm(b))) for a, b in parts]
    return [b / a - 1 if a else 0.0 for a, b in norms]


def as_entry(moved: Movement) -> dict[str, object]:
    """Return all but the singular values themselves, for JSON."""
    return {key: value for key, value in moved._asdict().items() if key != "after"}

"""What a list of singular values says: how they are spread, how many hold the energy, which stand apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from spectune.spectrum.bulk import fit_bulk

ENERGIES = (0.9, 0.95, 0.99)
_ZERO = 1e-7  # of the largest: what the decomposition itself rounds to


class Measures(BaseModel):
    """Figures of one matrix's singular values S, descending.

    Args:
        count: of singular values.
        largest: S_0.
        median: of S.
        smallest: S_k.
        share: of values within the range asked for.
        stable_rank: ||W||_F^2 / S_0^2.
        effective_rank: exp of the entropy of S / sum(S).
        rank_90: fewest values that hold 90% of the energy sum(S^2).
        rank_95: fewest that hold 95%.
        rank_99: fewest that hold 99%.
        condition: S_0 / S_k, None where S_k is zero up to rounding.
        gap: the largest S_i / S_{i+1} in the upper half: a "big" and a "small" group would show as a large one.
        gap_after: how many values are above that gap.
        sigma: of the Marchenko-Pastur bulk; this and what follows None where there is none.
        edge: of the bulk.
        outliers: values above it.
        outlier_energy: their share of sum(S^2).
        bulk_distance: from the rest to the bulk (Kolmogorov-Smirnov).

    References:
        Roy and Vetterli (2007) for the effective rank.
    """

    count: int
    largest: float
    median: float
    smallest: float
    share: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    condition: float | None
    gap: float
    gap_after: int
    sigma: float | None
    edge: float | None
    outliers: int | None
    outlier_energy: float | None
    bulk_distance: float | None


def measure(S: np.ndarray, shape: tuple[int, int], low: float = 0.1, high: float = 1.1) -> Measures:
    """Return the figures of singular values.

    Args:
        S: all singular values of a matrix, descending.
        shape: (out, in).
        low: lower end of the range whose share is counted.
        high: upper end, included.
    """
    S = np.asarray(S, np.float64)
    energy = S**2
    total = energy.sum()
    held = np.cumsum(energy) / (total or 1.0)
    ranks = [int(np.searchsorted(held, e * held[-1]) + 1) if total else 0 for e in ENERGIES]
    gap, after = _gap(S)
    bulk = fit_bulk(S, shape)
    return Measures(
        count=len(S),
        largest=float(S[0]),
        median=float(np.median(S)),
        smallest=float(S[-1]),
        share=float(((low <= S) & (high >= S)).mean()),
        stable_rank=float(total / energy[0]) if total else 0.0,
        effective_rank=_effective_rank(S),
        rank_90=ranks[0],
        rank_95=ranks[1],
        rank_99=ranks[2],
        condition=float(S[0] / S[-1]) if S[-1] > _ZERO * S[0] else None,
        gap=gap,
        gap_after=after,
        sigma=bulk and bulk.sigma,
        edge=bulk and bulk.edge,
        outliers=bulk and bulk.outliers,
        outlier_energy=bulk and (float(held[bulk.outliers - 1]) if bulk.outliers else 0.0),
        bulk_distance=bulk and bulk.distance,
    )


def _effective_rank(S: np.ndarray) -> float:
    p = S[S > 0] / (S.sum() or 1.0)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def _gap(S: np.ndarray) -> tuple[float, int]:
    """Return the largest ratio of neighbours in the upper half, and how many values are above it."""
    upper = S[: len(S) // 2 + 1]
    upper = upper[upper > _ZERO * S[0]] if S[0] else upper[:0]
    if len(upper) < 2:
        return 1.0, 0
    ratios = upper[:-1] / upper[1:]
    return float(ratios.max()), int(ratios.argmax()) + 1


def curve(S: np.ndarray, points: int = 96) -> tuple[list[int], list[float]]:
    """Return ranks (from 1, evenly spaced in their logarithm) and the singular values there."""
    ranks = np.unique(np.round(np.geomspace(1, len(S), points)).astype(int))
    return ranks.tolist(), S[ranks - 1].tolist()


def recommended_ranks(
    measured: Sequence[Measures], shapes: Sequence[tuple[int, int]], mean: int = 16, low: int = 4, high: int = 64
) -> list[int]:
    """Return a rank for each matrix, in proportion to the values above its bulk.

    The factor is such that a LoRA has as many parameters as one of rank `mean` everywhere; then each rank is clipped to
    low..high and to half of min(out, in).  Where there is no bulk, the rank that holds 90% of the energy stands for the
    outliers.
    """
    wanted = [m.rank_90 if m.outliers is None else m.outliers for m in measured]
    sizes = [sum(shape) for shape in shapes]
    parameters = sum(w * size for w, size in zip(wanted, sizes, strict=True))
    factor = mean * sum(sizes) / parameters if parameters else 0.0
    most = [max(1, min(high, min(shape) // 2)) for shape in shapes]
    return [min(max(low, round(factor * w)), limit) for w, limit in zip(wanted, most, strict=True)]

"""The part of a spectrum that noise explains: a Marchenko-Pastur bulk, and the outliers above it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_POINTS = 4096  # of the quadrature; its error is below 1e-6
_TRACY_WIDOM_99 = 2.0234  # 99% quantile of the Tracy-Widom law of real matrices
_ROUNDS = 20
_ZERO = 1e-6  # of the largest
_FEWEST = 8  # singular values that a bulk is fitted to


class Bulk(NamedTuple):
    """A Marchenko-Pastur bulk fitted to singular values.

    Args:
        sigma: standard deviation of the noise entries.
        edge: where the bulk ends, sigma (sqrt(out) + sqrt(in)).
        outliers: singular values above the edge by more than noise reaches in one matrix of a hundred.
        distance: the largest difference between the bulk's distribution function and that of the values that are no
            outliers (Kolmogorov-Smirnov): below 0.025 for noise of a few hundred values.
    """

    sigma: float
    edge: float
    outliers: int
    distance: float


def fit_bulk(S: np.ndarray, shape: tuple[int, int]) -> Bulk | None:
    """Fit the bulk by its median: sigma = median(S) / (sqrt(max(out, in)) median of Marchenko-Pastur).

    Entries of variance sigma^2 have squared singular values, divided by max(out, in), of density
    sqrt((b - x)(x - a)) / (2 pi g sigma^2 x) between a, b = sigma^2 (1 -+ sqrt(g))^2, g = min(out, in) / max(out, in).
    The median hardly feels what is above the bulk; what is, is left out, and the rest fitted again as noise that has
    lost as many rows and columns, until nothing changes.

    Args:
        S: singular values, descending.
        shape: (out, in).

    Returns:
        The bulk, or None where there are fewer than 8 values, or half of what is no outlier is zero.

    References:
        Marchenko and Pastur (1967); Johnstone (2001) for the fluctuation of the edge; Gavish and Donoho,
        arXiv 1305.5870, for the median.
    """
    long, k = max(shape), len(S)
    if k < _FEWEST:
        return None
    outliers, sigma = 0, 0.0
    for _ in range(_ROUNDS):
        scale, x, F = _law(long - outliers, k - outliers)
        median = float(np.median(S[outliers:]))
        if not median > _ZERO * S[0]:
            return None
        sigma = median / (scale * float(np.interp(0.5, F, x)))
        found = int((sigma * _reach(long, k) < S).sum())
        if found == outliers or k - found < _FEWEST:
            break
        outliers = found
    scale, x, F = _law(long - outliers, k - outliers)
    rest = S[outliers:][::-1] / (sigma * scale)
    expected = np.interp(rest, x, F)
    steps = np.arange(len(rest) + 1) / len(rest)
    distance = float(np.maximum(expected - steps[:-1], steps[1:] - expected).max())
    return Bulk(sigma, sigma * (math.sqrt(long) + math.sqrt(k)), outliers, distance)


def _reach(long: int, short: int) -> float:
    """Return the singular value that one noise matrix of unit variance in a hundred exceeds."""
    root = math.sqrt(long - 1) + math.sqrt(short)
    scale = root * (1 / math.sqrt(max(1, long - 1)) + 1 / math.sqrt(short)) ** (1 / 3)
    return math.sqrt(root**2 + _TRACY_WIDOM_99 * scale)


@lru_cache(maxsize=256)
def _law(long: int, short: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return sqrt(long), points s / (sigma sqrt(long)) from edge to edge, and the distribution function there.

    With x = 1 + g + 2 sqrt(g) cos(t) for the squares, the density is smooth in t.
    """
    ratio = short / long
    t = np.pi * (1 - (np.arange(_POINTS) + 0.5) / _POINTS)
    squares = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(t)
    density = 4 * ratio * np.sin(t) ** 2 / (2 * np.pi * ratio * np.maximum(squares, 1e-300))
    F = np.cumsum(density) * np.pi / _POINTS
    return math.sqrt(long), np.sqrt(squares), (F - density * np.pi / _POINTS / 2) / F[-1]

"""Confidence intervals of accuracies and of their differences on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson(right: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share."""
    n, p = len(right), sum(right) / len(right)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def difference(ours: Sequence[bool], theirs: Sequence[bool], draws: int = 10_000) -> tuple[float, float, float]:
    """Return the mean of ours - theirs over the same prompts, and its 95% interval by the bootstrap."""
    gaps = np.asarray(ours, float) - np.asarray(theirs, float)
    means = np.random.default_rng(0).choice(gaps, (draws, len(gaps))).mean(1)
    return float(gaps.mean()), *(float(x) for x in np.quantile(means, (0.025, 0.975)))  # type: ignore[return-value]

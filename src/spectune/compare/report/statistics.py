"""What a few runs allow to be said: intervals, paired differences, and significance corrected for many of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from spectune.errors import need

LEVEL = 0.95
_DRAWS = 20_000


class Interval(NamedTuple):
    """A mean and where it may lie.

    Args:
        mean: of the values.
        low: lower end of the interval; None where there is none.
        high: upper end.
    """

    mean: float
    low: float | None = None
    high: float | None = None


class Difference(NamedTuple):
    """A mean of paired differences, where it may lie, and how likely chance alone is to make one as large.

    Args:
        mean: of the differences.
        low: lower end of the interval; None where there is none.
        high: upper end.
        p: two-sided p-value; None where there is none.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean and its Student-t interval, mean ± t_{n-1} s / sqrt(n).

    Args:
        values: of independent runs; a single one has no interval, nor have equal ones, which have no spread.
        level: probability that the interval holds the true mean, where the values are normal.

    Raises:
        SpectuneError: scipy is missing.
    """
    mean, error = _mean_and_error(values)
    if not error:
        return Interval(mean)
    half = error * float(_scipy_stats().t.ppf((1 + level) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def paired_difference(values: Sequence[float], baseline: Sequence[float], level: float = LEVEL) -> Difference:
    """Return the mean of values - baseline, its Student-t interval, and the p-value of the paired t-test.

    Equal differences have no spread to be judged by: no interval and no p-value.

    Args:
        values: one for each run.
        baseline: of the runs that they are paired with (the same seeds), in the same order.
        level: of the interval.

    Raises:
        SpectuneError: scipy is missing.
    """
    differences = [float(a) - float(b) for a, b in zip(values, baseline, strict=True)]
    mean, error = _mean_and_error(differences)
    if not error:
        return Difference(mean)
    _, low, high = mean_interval(differences, level)
    p = 2 * float(_scipy_stats().t.sf(abs(mean) / error, len(differences) - 1))
    return Difference(mean, low, high, p)


def crossed_difference(
    values: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], level: float = LEVEL
) -> Difference:
    """Return the mean of values - baseline over seeds and records, and where it may lie for others of both.

    A difference is a mean plus what its seed, its record, and both together add (crossed random effects).  From the
    mean squares of the two-way analysis of variance, with S seeds and R records, the mean's variance is (a + b) /
    (S R), of which a = MS_seeds is known with S - 1 degrees of freedom and b = max(MS_records - MS_rest, 0) with R - 1.
    The half width of the interval is the mean of Satterthwaite's, t_f sqrt(a + b) with f of both, and Howe's,
    sqrt(t_(S-1)^2 a + t_(R-1)^2 b): with few seeds one is too narrow and the other too wide.  The p-value is that of
    the interval that just reaches 0.

    Args:
        values: a row for each seed, a number for each record.
        baseline: of the same seeds and records.
        level: of the interval.

    Returns:
        The difference; without an interval where there is one seed or one record, or no spread.

    Raises:
        SpectuneError: scipy is missing.
    """
    cells = np.subtract(np.asarray(values, float), np.asarray(baseline, float))
    mean, half = _crossed(cells)
    if half is None:
        return Difference(mean)
    wide = half(1 - level)
    return Difference(mean, mean - wide, mean + wide, _p_value(abs(mean), half))


def crossed_interval(values: Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """Return the mean over seeds and records, and where it may lie for others of both, as `crossed_difference` has it.

    Args:
        values: a row for each seed, a number for each record.
        level: of the interval.

    Raises:
        SpectuneError: scipy is missing.
    """
    mean, half = _crossed(np.asarray(values, float))
    return Interval(mean) if half is None else Interval(mean, mean - half(1 - level), mean + half(1 - level))


def _crossed(cells: Any) -> tuple[float, Callable[[float], float] | None]:
    """Return the mean of a table of seeds and records, and the interval's half width by how often it may fail."""
    seeds, records = cells.shape
    mean = float(cells.mean())
    if seeds < 2 or records < 2:
        return mean, None
    rows, columns = cells.mean(1) - mean, cells.mean(0) - mean
    rest = cells - mean - rows[:, None] - columns
    of_seeds = records * float(rows @ rows) / (seeds - 1)
    of_records = seeds * float(columns @ columns) / (records - 1)
    of_rest = float((rest * rest).sum()) / ((seeds - 1) * (records - 1))
    more = max(of_records - of_rest, 0.0)
    total = of_seeds + more
    if total <= 1e-24:
        return mean, None
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + more**2 / (records - 1))
    quantile = _scipy_stats().t.isf

    def half(failing: float) -> float:
        together, one, other = (float(quantile(failing / 2, df)) for df in (freedom, seeds - 1, records - 1))
        widths = together * math.sqrt(total), math.sqrt(one**2 * of_seeds + other**2 * more)
        return sum(widths) / 2 / math.sqrt(cells.size)

    return mean, half


def _p_value(distance: float, half: Callable[[float], float]) -> float:
    """Return how often an interval may fail that just reaches so far, by bisection on the logarithm."""
    low, high = -40.0, 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if half(math.exp(middle)) > distance else (low, middle)
    return math.exp(high)


def record_difference(
    values: Sequence[float], baseline: Sequence[float], level: float = LEVEL, draws: int = _DRAWS
) -> Difference:
    """Return the mean of values - baseline over records, and what a paired bootstrap over the records says of it.

    The interval is that between quantiles of the means of `draws` samples of the records with repetition; the p-value
    is twice the share of them on the far side of 0.  The draws are seeded.

    Args:
        values: one for each record, as whether it was answered right.
        baseline: of the same records.
        level: of the interval.
        draws: number of samples.
    """
    differences = np.subtract(np.asarray(values, float), np.asarray(baseline, float))
    # a sample with repetition is how often each value comes up, and few values differ
    kinds, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    means = np.random.default_rng(0).multinomial(n, counts / n, size=draws) @ kinds / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    slack = 1e-12  # rounding
    tail = min(int((means <= slack).sum()), int((means >= -slack).sum()))
    return Difference(float(differences.mean()), float(low), float(high), min(1.0, 2 * (tail + 1) / (draws + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down procedure.

    With p_(1) <= ... <= p_(m), the i-th becomes max over j <= i of min(1, (m - j + 1) p_(j)): calling those below 0.05
    significant is wrong about any of them at most once in twenty comparisons.

    Args:
        p_values: of all hypotheses that are tested together.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(order)
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * float(p_values[i])))
        corrected[i] = highest
    return corrected


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error: None for one value, 0 for values that differ by rounding alone."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, error if error > 1e-12 * max(map(abs, values)) else 0.0


def _scipy_stats() -> ModuleType:
    return need("scipy.stats", "an interval", "'spectune[compare]'")

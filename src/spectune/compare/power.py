"""What a comparison can tell, before it is run: how small a difference, with so many seeds and test records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spectune.errors import need

MOST_SEEDS = 20  # that are chosen
_FOUND = 0.8  # how often a difference that is there is found
_CHANCE = 0.05  # how often one is found that is not
_UNLIKE = 0.1  # records in which two methods disagree, before any run says it
_MOST_RECORDS = 10**6


class Spread(NamedTuple):
    """What makes the difference of two methods uncertain.

    Args:
        of_seeds: variance of a method's metric over seeds.
        unlike: share of the records that two runs do not answer alike; None where the metric is not of single records.
    """

    of_seeds: float = 0.0
    unlike: float | None = _UNLIKE


def spread(values: Sequence[float], right: Sequence[Sequence[int]] | None = None) -> Spread:
    """Return the spread that the runs of one method show.

    Two methods are taken to disagree on as many records as two of its runs do, and to go on doing so with more seeds.

    Args:
        values: the metric at each seed, two or more.
        right: for each seed, whether each record was answered right, where the metric is of that kind.
    """
    variance = float(np.var(values, ddof=1))
    if right is None:
        return Spread(variance, None)
    table = np.asarray(right, float)
    count, records = table.shape
    pairs = [float(np.mean(table[i] != table[j])) for i in range(count) for j in range(i)]
    unlike = max(float(np.mean(pairs)), 1 / records)
    share = float(table.mean())
    of_records = min(unlike / 2, share * (1 - share)) / records  # what the runs' noise record by record adds to it
    return Spread(max(variance - of_records, 0.0), unlike)


def detectable(spread: Spread, seeds: int, records: int) -> float:
    """Return the smallest true difference that is found four times in five, at a p-value of 0.05.

    With S seeds and R records, sqrt((t + t')^2 2 v / S + (z + z')^2 d / R), v the variance over seeds, d the share of
    records that differ, t and t' the quantiles of Student's distribution at 0.975 and 0.8 (S - 1 degrees of freedom),
    and z and z' the normal ones.

    Args:
        spread: of the pilot.
        seeds: runs of each method; with one, what the records say.
        records: of the test.

    Raises:
        SpectuneError: scipy is missing.
    """
    stats = need("scipy.stats", "what can be told", "'spectune[compare]'")
    z = float(stats.norm.isf(_CHANCE / 2) + stats.norm.ppf(_FOUND))
    variance = 0.0 if spread.unlike is None else z**2 * spread.unlike / records
    if seeds > 1:
        t = float(stats.t.isf(_CHANCE / 2, seeds - 1) + stats.t.ppf(_FOUND, seeds - 1))
        variance += t**2 * 2 * spread.of_seeds / seeds
    return math.sqrt(variance)


def seeds_for(spread: Spread, difference: float, records: int) -> int | None:
    """Return the fewest seeds, two or more, with which a difference is found; None where 50 are too few."""
    return next((n for n in range(2, 51) if detectable(spread, n, records) <= difference), None)


def records_for(spread: Spread, difference: float, seeds: int) -> int | None:
    """Return the fewest test records, in two digits, with which a difference is found; None where none are enough."""
    if spread.unlike is None:
        return None
    low, high = 1, _MOST_RECORDS
    if detectable(spread, seeds, high) > difference:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(spread, seeds, middle) <= difference else (middle + 1, high)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit


def told(spread: Spread, seeds: int, records: int, wanted: float, *, percent: bool, pilot: str | None = None) -> str:
    """Return in a sentence what can be told, and what a smaller difference needs.

    Args:
        spread: of the pilot, or what is assumed without one.
        seeds, records: that there are.
        wanted: the difference that is asked for.
        percent: whether the metric is a share, so that differences are points.
        pilot: the method whose runs the spread is of.
    """

    def said(value: float) -> str:
        return f"{100 * value:.2g} points" if percent else f"{value:.2g}"

    found = detectable(spread, seeds, records)
    have = f"{seeds} seed{'s' * (seeds != 1)} and {records:,} test records tell a difference of {said(found)}"
    basis = "if two methods disagree on one record in ten" if pilot is None else f"by the runs of {pilot}"
    if found <= wanted:
        return f"{have}, {basis}"
    more = []
    if (other := seeds_for(spread, wanted, records)) is not None and other > seeds:
        more.append(f"{other} seeds")
    if (count := records_for(spread, wanted, seeds)) is not None:
        more.append(f"{count:,} test records")
    needs = " or ".join(more) or "more of both seeds and test records"
    return f"{have}, {basis}; {said(wanted)} need{'s' * (not percent)} {needs}"

"""What bears no verdict: a task that nothing learned or that is learned whole, and methods that fell apart.

And how much a method depends on its learning rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

_APART = 0.5  # of what the best method learns: so far below a method's best seed, another fell apart
_SURE = 3.0  # standard errors over records
_WITHIN = 0.01  # of a share, and of what is learned of a loss: as near to the best, a rate is as good


def fell_apart(
    values: Mapping[int, float], start: float | None, best: float, *, greater: bool, records: int | None = None
) -> list[int]:
    """Return the seeds at which a method ended further below its best seed than half of what the best method learns.

    Args:
        values: of the test, by seed.
        start: what the model has before any step; None where that is not known.
        best: the mean of the best method.
        greater: whether more is better.
        records: of the test, where the metric is their share: then the distance is more than chance over them, too.
    """
    if start is None or not values:
        return []
    sign = 1 if greater else -1
    learned = sign * (best - start)
    own = max(sign * value for value in values.values())
    chance = 0.0 if records is None else _SURE * math.sqrt(2 * max(best * (1 - best), 0.0) / records)
    far = max(_APART * learned, chance)
    return [seed for seed, value in values.items() if learned > 0 and own - sign * value > far]


def uncounted(
    best: float, start: float | None, resolution: float | None, *, greater: bool, share: bool
) -> Literal["floor", "ceiling"] | None:
    """Return why a task cannot tell methods apart, "floor" or "ceiling"; None where it may.

    Args:
        best: the mean of the best method.
        start: what the model has before any step.
        resolution: the smallest difference that could have been told.
        greater: whether more is better.
        share: whether the metric is one of records, so that 1 is all there is.
    """
    if resolution is None:
        return None
    learned = None if start is None else (best - start if greater else start - best)
    if learned is not None and learned < 2 * resolution:
        return "floor"
    return "ceiling" if share and 1 - best < resolution else None


class Width(NamedTuple):
    """How wide the range of good learning rates is.

    Args:
        octaves: from the lowest to the highest rate that is about as good as the best, between rates that ran by
            straight lines.
        open: whether an end of it is an end of the rates that ran, so that it may be wider.
    """

    octaves: float
    open: bool


def width(tried: Sequence[tuple[float, float]], start: float | None, *, greater: bool, share: bool) -> Width | None:
    """Return the width of the rates that are within 1 point of the best.

    Of a loss, within a hundredth of what is learned.

    Args:
        tried: learning rates with what they came to, several times where they ran with several seeds.
        start: what the model has before any step.
        greater: whether more is better.
        share: whether the metric is a share.

    Returns:
        The width; None where fewer than two rates ran.
    """
    sign = 1 if greater else -1
    by_rate: dict[float, list[float]] = {}
    for rate, value in tried:
        by_rate.setdefault(rate, []).append(sign * value)
    points = [(math.log2(rate), sum(values) / len(values)) for rate, values in sorted(by_rate.items())]
    if len(points) < 2:
        return None
    at = max(range(len(points)), key=lambda i: points[i][1])
    best = points[at][1]
    learned = best - (min(value for _, value in points) if start is None else sign * start)
    floor = best - (_WITHIN if share else _WITHIN * max(learned, 0.0))
    ends = [_end(points[: at + 1][::-1], floor), _end(points[at:], floor)]
    return Width(abs(ends[1][0] - ends[0][0]), ends[0][1] or ends[1][1])


def _end(points: Sequence[tuple[float, float]], floor: float) -> tuple[float, bool]:
    """Return where values that start above a floor come down to it, and whether they do not."""
    for (here, value), (there, lower) in itertools.pairwise(points):
        if lower < floor:
            return here + (there - here) * (value - floor) / (value - lower), False
    return points[-1][0], True

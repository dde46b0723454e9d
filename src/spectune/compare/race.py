"""A race of learning rates over seeds: which runs come next, and which rate is best, given what runs so far showed.

Rates lie on a ladder, a factor apart, and are known by their place on it: 0 is the middle.  Nothing here knows of
files, models or clocks, so that a race is replayed on runs that were made before or drawn (benchmarks/study/drawn.py).

What a run ends at is taken to be f(place) + g(seed) + noise: f a Gaussian process over the ladder, so that a rate is
judged by its neighbours too, and g what a seed's order of the data and its fold of the validation data add to every
rate.  Above the best rate training falls apart, and how deep it falls says nothing of the rates that are good: a run
that ends more than a share of what is learned below the best counts as that far below, and a rate at which a third of
the runs does says nothing of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

Key = tuple[int, int]  # a place on the ladder, and the number of a seed
Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_DEEP = 0.3  # of what is learned: as far below the best, a run has fallen apart
_SMOOTH = 1.75  # places over which f bends
_NOISE = 0.1  # of what is learned: what a run is taken to be off by before runs say it; a grid had 0.14 to 0.25
_NOISE_WEIGHT = 4.0  # runs that this is worth
_BEHIND = 1.0  # standard deviations of a difference: further behind, a rate gets no more runs
_UNSTABLE = 1 / 3  # of a rate's runs that fell apart
_SURE = 3.0  # standard errors over records by which a run is behind when it is stopped
_EDGE = 0.1  # weight of the next rate up where one is chosen: beyond the best, training falls apart
_SOUND = 3  # runs that the best rate has in the end
_FAR = 8  # places from the middle, a factor of a hundred by default, where nothing learns
_AT_ONCE = 2  # runs that are chosen together
_NEAR = 0.05  # of what is learned: less expected of a place beside one that was measured, by the square of how far
_AWAY = 3  # places from it, from which on no less is expected
_LEFT = 1.0  # standard deviations of a difference: by more, another place has to be better than it


class Look(NamedTuple):
    """What a run showed at one step.

    Args:
        step: of the run; 0 is before the first.
        value: of validation data; more is better.
        right: whether each record was answered right, where the metric is of that kind.
    """

    step: int
    value: float
    right: Sequence[int] | None = None


@dataclass(frozen=True)
class Run:
    """What a run showed.

    Args:
        looks: in order, the first before any step; none of one that failed.
        ended: whether it came to its last step.
    """

    looks: tuple[Look, ...] = ()
    ended: bool = False

    @property
    def start(self) -> float:
        """Before any step; minus infinity of a run that failed, or where nothing can be said of the model yet."""
        return self.looks[0].value if self.looks and math.isfinite(self.looks[0].value) else -math.inf

    @property
    def value(self) -> float:
        """At the last look; minus infinity of a run that failed."""
        last = self.looks[-1].value if self.looks else -math.inf
        return last if math.isfinite(last) else -math.inf


Runs = Mapping[Key, Run]


@dataclass(frozen=True)
class Race:
    """The rules of a race.

    Args:
        first: rates that may be tried first, every second place of the ladder around its middle, one way as long as
            it gets better.
        runs: whole runs that the race may take, as far as this is known before a run.
        warmup: share of the steps in which the rate rises.
        low, high: the ends of the ladder.
        seeds: that a rate is given at most.
        measured: whether the middle was found near the best by something else than these runs (`lr: auto`): it is
            chosen unless another is better beyond chance, or all of its runs, two at least, fell apart.
    """

    first: int = 3
    runs: float = 8.0
    warmup: float = 0.0
    low: int = -10
    high: int = 10
    seeds: int = 5
    measured: bool = False

    def next(self, runs: Runs) -> list[Key]:
        """Return the runs that come next, which do not depend on each other; none when the race is over.

        Args:
            runs: all that were chosen before.
        """
        if (start := self._start(runs)) is not None:
            return [(start, 0)]
        left = math.floor(self.runs - self.cost(runs) + 0.5)
        return self._wanted(runs)[: min(_AT_ONCE, left)] if left > 0 else []

    def _start(self, runs: Runs) -> int | None:
        """Return the next place of the start: upwards as long as it gets better, then downwards likewise.

        One run after another, since the next is stopped by those before: a rate that is far too low costs half a run
        then.  One below the middle is always tried: where the middle has fallen apart, what is above says nothing.
        """

        def value(place: int) -> float:
            run = runs[place, 0]
            return run.value if run.ended else -math.inf

        best = -math.inf
        for side, steps in ((2, self.first // 2), (-2, (self.first - 1) // 2)):
            for place in range(0 if side > 0 else side, side * steps + side, side):
                if not self.low <= place <= self.high:
                    break
                if (place, 0) not in runs:
                    return place
                if value(place) <= best:
                    break
                best = value(place)
        return None

    def cost(self, runs: Runs) -> float:
        """Return what runs took, in whole ones; one that failed counts as half of one."""
        whole = max((run.looks[-1].step for run in runs.values() if run.looks and run.ended), default=1)
        return sum(run.looks[-1].step / whole if run.looks else 0.5 for run in runs.values())

    def _wanted(self, runs: Runs) -> list[Key]:
        """Return the runs that say most of which rate is best, in order."""
        seen = Seen(runs, self.measured)
        if not seen.learned:
            return self._outwards(runs)
        leader, tried = seen.leader(), set(seen.places)
        near = [p for p in (leader + 1, leader - 1) if p not in tried and self.low <= p <= self.high]
        if near:  # the best has its neighbours: where peaks are narrow, a place between two says nothing of itself
            return [(place, 0) for place in near]
        places = sorted(tried)
        mean, covariance = seen.posterior(places)
        at = places.index(leader)
        behind = {}
        for i, place in enumerate(places):
            spread = _spread(covariance, i, at)
            if not seen.unstable(place) and seen.count(place) < self.seeds:
                behind[place] = (mean[at] - mean[i]) / spread if spread > 0 else 0.0 if i == at else math.inf
        close = [place for place in behind if behind[place] <= _BEHIND]
        if close in ([], [leader]) and seen.count(leader) >= _SOUND:
            return []
        close = close or list(behind)
        return [(place, seen.count(place)) for place in sorted(close, key=lambda p: (seen.count(p), behind[p], p))]

    def _outwards(self, runs: Runs) -> list[Key]:
        """Return what may learn where nothing tried does: rates further out, then those between, then other seeds."""
        tried = {place for place, _ in runs}
        further = [(p, 0) for p in (max(tried) + 2, min(tried) - 2) if self.low <= p <= self.high and abs(p) <= _FAR]
        if further:
            return further
        between = [place for place in range(min(tried), max(tried)) if place not in tried]
        if between:
            return [(place, 0) for place in sorted(between, key=abs)]
        counts = {place: sum(key[0] == place for key in runs) for place in tried}
        return [(p, counts[p]) for p in sorted(tried, key=lambda p: (counts[p], abs(p))) if counts[p] < self.seeds]

    def stops(self, runs: Runs, key: Key, looks: Sequence[Look]) -> bool:
        """Return whether a run is stopped at its last look.

        It is where the best ended run of its seed has learned a good part of what it learns, and this one is so far
        behind it there that it would count as fallen apart, beyond chance over the records; never in the first half.

        Args:
            runs: all that ended before this one was chosen.
            key: of the run.
            looks: of it so far.
        """
        now = looks[-1]
        others = [run for (_, seed), run in runs.items() if seed == key[1] and run.ended and run.looks]
        if not others:
            return False
        best = max(others, key=lambda run: run.value)
        whole = best.looks[-1].step
        if not max(self.warmup, 0.5) * whole <= now.step < whole:
            return False
        start, there = best.looks[0], next((look for look in best.looks if look.step == now.step), None)
        learned = best.value - start.value
        if there is None or learned <= 0 or there.value - start.value < learned / 2:
            return False
        if not math.isfinite(now.value):
            return True
        short = there.value - now.value
        return short > _DEEP * learned and short > _SURE * _record_error(there, now, learned)

    def best(self, runs: Runs) -> int | None:
        """Return the place of the best rate, or None where no run came to its end.

        It is one with as many runs as the race gave any, as far as there is one that did not fall apart in a third of
        them.
        """
        seen = Seen(runs, self.measured)
        leader = seen.leader(most=True) if seen.places else None
        return 0 if leader is not None and self.measured and not seen.surpassed(0, leader) else leader


def _record_error(one: Look, other: Look, learned: float) -> float:
    """Return the standard error of the difference of two looks over their records; half of `_DEEP` without records."""
    if one.right is None or other.right is None or len(one.right) != len(other.right):
        return 0.5 * _DEEP * learned
    differences = np.subtract(one.right, other.right)
    return max(float(differences.std()), 1 / len(differences)) / math.sqrt(len(differences))


def _spread(covariance: Values, i: int, j: int) -> float:
    """Return the standard deviation of a difference."""
    return math.sqrt(max(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j], 0.0))


class Seen:
    """What runs say of the rates.

    Args:
        runs: those that ended or were stopped, or failed.
        measured: whether the middle was found near the best by something else.
    """

    def __init__(self, runs: Runs, measured: bool = False) -> None:
        ended = [run.value for run in runs.values() if run.ended]
        known = [value for value in ended if math.isfinite(value)]
        self.top = max(known, default=-math.inf)
        starts = [run.start for run in runs.values() if math.isfinite(run.start)]
        self.start = float(np.median(starts)) if starts else -math.inf
        self.gain = self.top - self.start if known and starts else 0.0
        self.keys = list(runs) if known else []
        self.places = sorted({place for place, _ in self.keys})
        self._runs, self._measured = runs, measured
        self._ended = {key for key in self.keys if runs[key].ended}

    @cached_property
    def learned(self) -> bool:
        """Whether any run did better than the base, by more than the records' chance."""
        best = max((run for run in self._runs.values() if run.ended), key=lambda run: run.value, default=None)
        if best is None or self.gain <= 0:
            return False
        return self.gain > 2 * _record_error(best.looks[0], best.looks[-1], 0.0)

    def count(self, place: int) -> int:
        """Return how many runs a rate has had."""
        return sum(key[0] == place for key in self.keys)

    def unstable(self, place: int) -> bool:
        """Return whether a third of a rate's runs or more fell apart, failed or were stopped."""
        own = [key for key in self.keys if key[0] == place]
        return bool(own) and sum(self._fell(key) for key in own) >= _UNSTABLE * len(own)

    def _fell(self, key: Key) -> bool:
        return key not in self._ended or self._runs[key].value < self._floor

    @cached_property
    def _floor(self) -> float:
        """Below which a run has fallen apart: by so much of what is learned, and beyond chance over the records."""
        best = max((self._runs[key] for key in self._ended), key=lambda run: run.value, default=None)
        chance = 0.0 if best is None else _SURE * _record_error(best.looks[0], best.looks[-1], 0.0)
        return self.top - max(_DEEP * self.gain, min(chance, self.gain))

    @cached_property
    def _values(self) -> Values:
        return np.array(
            [max(self._runs[key].value, self._floor) if key in self._ended else self._floor for key in self.keys]
        )

    @cached_property
    def _noise(self) -> float:
        """The variance of a run about its rate and seed: that of the residuals, and what is assumed before them."""
        rates, seeds = sorted({p for p, _ in self.keys}), sorted({s for _, s in self.keys})
        design = np.zeros((len(self.keys), len(rates) + len(seeds)))
        for row, (place, seed) in enumerate(self.keys):
            design[row, rates.index(place)] = design[row, len(rates) + seeds.index(seed)] = 1
        rest = self._values - design @ np.linalg.lstsq(design, self._values, rcond=None)[0]
        freedom = len(self.keys) - int(np.linalg.matrix_rank(design))
        assumed = _NOISE_WEIGHT * (_NOISE * max(self.gain, 1e-12)) ** 2
        return (assumed + float(rest @ rest)) / (_NOISE_WEIGHT + freedom)

    def posterior(self, places: Sequence[int]) -> tuple[Values, Values]:
        """Return the mean and the covariance of f at places, given the runs."""
        scale = (_DEEP * max(self.gain, 1e-12)) ** 2
        held = [not self.unstable(place) for place, _ in self.keys]
        held = held if any(held) else [True] * len(held)
        own = np.array([place for place, _ in self.keys], float)[held]
        seeds = np.array([seed for _, seed in self.keys])[held]
        asked = np.array(places, float)

        def kernel(a: Values, b: Values) -> Values:
            return scale * np.exp(-0.5 * ((a[:, None] - b[None, :]) / _SMOOTH) ** 2)

        shared = (seeds[:, None] == seeds[None, :]) * self._noise  # seeds differ as much as runs of one do
        within = kernel(own, own) + shared + self._noise * np.eye(len(own))
        across = kernel(asked, own)
        values = self._values[held] - self._expected(own)
        weights = np.linalg.solve(within, np.column_stack([values, np.ones(len(own)), across.T]))
        mean = float(weights[:, 0].sum() / weights[:, 1].sum())  # by generalized least squares
        found = mean + self._expected(asked) + across @ (weights[:, 0] - mean * weights[:, 1])
        return found, kernel(asked, asked) - across @ weights[:, 2:]

    def _expected(self, places: Values) -> Values:
        """Return what is expected of places before any run, but for a constant."""
        return -_NEAR * max(self.gain, 0.0) * np.minimum(np.abs(places), _AWAY) ** 2 * self._measured

    def surpassed(self, place: int, other: int) -> bool:
        """Return whether another place is better beyond chance, or all runs of this one failed or fell apart."""
        own = [key for key in self.keys if key[0] == place]
        if not self._ended.intersection(own) or (len(own) >= 2 and all(map(self._fell, own))):
            return True
        mean, covariance = self.posterior([place, other])
        return bool(mean[1] - mean[0] > _LEFT * _spread(covariance, 0, 1))

    def leader(self, *, most: bool = False) -> int:
        """Return the place with the best mean of those that do not fall apart, or of all where all do.

        Args:
            most: of those alone that have at least two runs, if there are such.
        """
        able: Iterable[int] = [p for p in self.places if any(key in self._ended for key in self.keys if key[0] == p)]
        sound = [place for place in able if not self.unstable(place)] or list(able)
        if most:
            sound = [place for place in sound if self.count(place) >= 2] or sound
        mean, _ = self.posterior([*sound, *(place + 1 for place in sound)])
        here, above = np.split(mean, 2)
        above = np.where([self.unstable(place + 1) for place in sound], self._floor, above)
        return sound[int(np.argmax((1 - _EDGE) * here + _EDGE * above))]

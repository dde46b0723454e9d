"""Surfaces of a metric over learning rates and seeds that are drawn, as runs of grids look like.

The metric rises from a floor to a peak over some octaves; above the peak, from somewhere on, training falls apart at
more and more seeds, to any depth.  A run is off by its seed, its fold of the validation data, and the records in it;
runs at low rates come late to what they come to.
"""

from __future__ import annotations

import math

import numpy as np

from spectune.compare.race import Key, Look, Run

RECORDS, STEPS, FLOOR = 160, 64, 0.22
PLACES = range(-5, 7)


def run(
    value: float,
    path: tuple[float, float, float] = (0.25, 0.5, 0.75),
    rng: np.random.Generator | None = None,
) -> Run:
    """Return a run that has come so far towards its value at the quarters."""
    values = [FLOOR, *(FLOOR + (value - FLOOR) * share for share in path), value]
    return Run(tuple(Look(STEPS * i // 4, v, answers(v, rng)) for i, v in enumerate(values)), ended=True)


def answers(value: float, rng: np.random.Generator | None = None) -> list[int]:
    """Return for each record whether it is answered right, a share of them."""
    right = np.zeros(RECORDS, int)
    right[: round(RECORDS * min(max(value, 0), 1))] = 1
    return (rng or np.random.default_rng(0)).permutation(right).tolist()


def surface(rng: np.random.Generator, seeds: int = 5) -> tuple[dict[Key, Run], dict[int, float]]:
    """Return runs by place and seed, and the mean over the seeds of the test by place."""
    peak, width, top = rng.uniform(-2, 2), rng.uniform(2.0, 4.0), rng.uniform(0.75, 0.9)
    cliff, folds = peak + rng.uniform(0.8, 2.5), rng.normal(0, 0.02, seeds)
    runs, true = {}, {}
    for place in PLACES:
        falls = 1 / (1 + math.exp(-4 * (place - cliff)))
        good = FLOOR + (top - FLOOR) * math.exp(-0.5 * ((place - peak) / width) ** 2)
        late = min(max(0.5 + 0.2 * (peak - place), 0.5), 2.0)
        path = (0.25**late, 0.5**late, 0.75**late)
        tested = [rng.uniform(0.18, 0.6) if rng.random() < falls else good + rng.normal(0, 0.01) for _ in range(seeds)]
        for seed, value in enumerate(tested):
            seen = value + folds[seed] + rng.normal(0, 0.7 * math.sqrt(value * (1 - value) / RECORDS))
            runs[place, seed] = run(min(max(seen, 0.0), 1.0), path, rng)
        true[place] = float(np.mean(tested))
    return runs, true

"""How far from the best rate a search ends: the race and the search before it, replayed on the grid.

    python benchmarks/study/regret.py
    python benchmarks/study/regret.py --drawn       on surfaces that are drawn (drawn.py), where no grid is needed

The truth of a rate is the mean of the test over all seeds of the grid.  Regret is the truth of the best rate less that
of the rate that a search chose, in points (hundredths of a nat where the metric is a loss).  Each grid is searched once
for each seed that may come first.  Methods whose grid is not whole yet are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from grid import GRID, PLANS, Plan, lines

from spectune.compare.config import LESS
from spectune.compare.race import Key, Look, Race, Run, Runs

RESULT = GRID / "regret.json"
WARMUP = 0.05  # the default of a run
MARGIN = 0.75  # whole runs that a race may be beyond what it is given
Search = Callable[["Surface"], "tuple[int | None, float]"]  # the place it chose, and what it cost in whole runs


class Surface(NamedTuple):
    """The whole grid of a method.

    Args:
        runs: by place and seed.
        losses: validation losses at the looks of each run.
        truth: mean of the test by place; more is better.
        seeds: of each rate.
        tests: by place and seed, as in `truth`; the worst of them where a run failed.
        start: the place that `lr: auto` came to; None where it measured nothing.
    """

    runs: dict[Key, Run]
    losses: dict[Key, list[float]]
    truth: dict[int, float]
    seeds: int
    tests: Mapping[Key, float] = MappingProxyType({})
    start: int | None = None

    def turned(self, by: int) -> Surface:
        """Return it with another seed first."""
        own = {key: (key[0], (key[1] + by) % self.seeds) for key in self.runs}
        runs = {key: self.runs[there] for key, there in own.items()}
        losses = {key: self.losses[there] for key, there in own.items()}
        return self._replace(runs=runs, losses=losses, tests=MappingProxyType({}))


def metric_of(plan: Plan) -> str:
    """Return what a grid is judged by."""
    return plan.keys.get("metric", "accuracy")


def surfaces(
    plan: Plan, held: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Surface]:
    """Return the grids that are whole, by method.

    Args:
        plan: of the grid.
        held: its lines.
        measured: lines of rates that `lr: auto` came to on its task.
    """
    sign, metric = -1 if metric_of(plan) in LESS else 1, metric_of(plan)
    found = {}
    for method in dict.fromkeys(line["method"] for line in held):
        own = {(line["place"], line["seed"]): line for line in held if line["method"] == method}
        if any((place, seed) not in own for place in plan.places for seed in range(plan.seeds)):
            continue
        runs = {key: run_of(line) for key, line in own.items()}
        failed = min((sign * line["test"][metric] for line in own.values() if line["test"]), default=0.0)
        tests = {key: sign * line["test"][metric] if line["test"] else failed for key, line in own.items()}
        truth = {place: float(np.mean([tests[place, seed] for seed in range(plan.seeds)])) for place in plan.places}
        losses = {key: line["losses"] for key, line in own.items()}
        rates = {place: own[place, 0]["lr"] for place in plan.places}
        taken = [line["lr"] for line in measured if line["method"] == method and line["lr"]]
        start = _nearest(rates, taken[0]) if taken else None
        found[method] = Surface(runs, losses, truth, plan.seeds, tests, start)
    return found


def best_place(surface: Surface) -> int:
    """Return the place of a ladder that the validation folds say is best."""
    means = {
        place: float(np.mean([surface.runs[place, seed].value for seed in range(surface.seeds)]))
        for place in surface.truth
    }
    return max(means, key=lambda place: (means[place], -place))


def _nearest(rates: Mapping[int, float], lr: float) -> int:
    return min(rates, key=lambda place: abs(math.log(rates[place] / lr)))


def run_of(line: Mapping[str, Any]) -> Run:
    """Return the run of a line."""
    if line["error"] is not None:
        return Run()
    looks = (Look(s, v, None if right is None else [int(digit) for digit in right]) for s, v, right in line["looks"])
    return Run(tuple(looks), ended=True)


def race(surface: Surface) -> tuple[int | None, float]:
    """Search as `spectune compare` does, for a quarter of the grid's cost."""
    return _raced(surface, None, len(surface.runs) / 4 - MARGIN)


def race_from_auto(surface: Surface) -> tuple[int | None, float]:
    """Search as `compare start=auto` does, for three quarters of that; what `lr: auto` takes is not counted."""
    return _raced(surface, surface.start, 0.75 * (len(surface.runs) / 4 - MARGIN))


def _raced(surface: Surface, measured: int | None, whole: float) -> tuple[int | None, float]:
    """Search from a place that was measured, or from the method's own rate, for so many whole runs."""
    places, start = list(surface.truth), measured or 0
    rules = Race(
        first=5 if len(places) > 5 else 3,
        runs=whole,
        warmup=WARMUP,
        low=min(places) - start,
        high=max(places) - start,
        seeds=surface.seeds,
        measured=measured is not None,
    )
    seen: Runs = {}
    while wanted := rules.next(seen):
        seen |= {key: _cut(rules, seen, key, surface.runs[key[0] + start, key[1]]) for key in wanted}
    best = rules.best(seen)
    return None if best is None else best + start, rules.cost(seen)


def _cut(rules: Race, seen: Runs, key: Key, run: Run) -> Run:
    """Return a run as far as a race lets it come."""
    looks = run.looks
    stop = next((i for i in range(2, len(looks)) if rules.stops(seen, key, looks[:i])), None)
    return run if stop is None else Run(looks[:stop])


def halving(surface: Surface) -> tuple[int | None, float]:
    """Search as `spectune compare` did before: three rates a factor of 3.2 apart at one seed, by successive halving.

    At a quarter and at half of a run the rate goes on that is in the better half of those that came so far, by the
    validation loss; where the best is at an end, on to the next, twice at most; the metric at the end decides.
    """
    rungs: list[list[float]] = [[], []]
    ended: dict[int, float] = {}
    cost, tried, wanted = 0.0, list[int](), [0, -2, 2]
    while wanted:
        place = wanted.pop(0)
        tried.append(place)
        run, losses = surface.runs[place, 0], surface.losses[place, 0]
        if run.looks:
            dropped = next((i for i, rung in enumerate(rungs) if _falls_behind(rung, losses[i + 1])), None)
            cost += (dropped + 1) / 4 if dropped is not None else 1.0
            if dropped is None:
                ended[place] = run.value
        if not wanted and ended and len(tried) < 5:
            best = max(ended, key=lambda at: ended[at])
            further = {min(tried): best - 2, max(tried): best + 2}.get(best)
            wanted = [] if further not in surface.truth else [further]
    return (max(ended, key=lambda at: ended[at]) if ended else None), cost


def _falls_behind(rung: list[float], loss: float) -> bool:
    rung.append(loss)
    return not loss <= sorted(rung)[max(len(rung) // 2, 1) - 1]


def own_rate(surface: Surface) -> tuple[int | None, float]:
    """Take the method's own rate."""
    return 0, 0.0


SEARCHES: dict[str, Search] = {
    "the race": race,
    "the race, start=auto": race_from_auto,
    "successive halving (before)": halving,
    "the method's own rate": own_rate,
}


def regrets(surface: Surface, search: Search) -> list[tuple[float, float]]:
    """Return the regret in points and the share of the grid's cost, with each seed first."""
    best, found = max(surface.truth.values()), []
    for by in range(surface.seeds):
        place, cost = search(surface.turned(by))
        reached = min(surface.truth.values()) if place is None else surface.truth[place]
        found.append((100 * (best - reached), cost / len(surface.runs)))
    return found


def told(rows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return what is said of searches."""
    lost, cost = np.array(rows).T
    return {
        "searches": len(rows),
        "median": round(float(np.median(lost)), 2),
        "q95": round(float(np.quantile(lost, 0.95)), 2),
        "worst": round(float(lost.max()), 2),
        "cost": round(float(cost.mean()), 3),
        "most": round(float(cost.max()), 3),
    }


def drawn(plan: Plan, count: int = 100) -> dict[str, Surface]:
    """Return surfaces that look as grids do, where rates above the best fall apart at some seeds."""
    from drawn import surface

    rng, found = np.random.default_rng(7), {}
    for i in range(count):
        every, true = surface(rng, plan.seeds)
        runs = {key: run for key, run in every.items() if key[0] in plan.places}
        losses = {key: [1 - look.value for look in run.looks] for key, run in runs.items()}
        found[str(i)] = Surface(runs, losses, {place: true[place] for place in plan.places}, plan.seeds)
    return found


def main() -> None:
    """Write what the searches come to, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawn", action="store_true")
    if parser.parse_args().drawn:
        held = drawn(PLANS["question-types"]).values()
        for name, search in SEARCHES.items():
            print(name, told([row for surface in held for row in regrets(surface, search)]))
        return
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in SEARCHES}
    whole = {}
    for task, plan in PLANS.items():
        measured = [line for line in lines(GRID / "auto.jsonl") if line["task"] == task]
        grids = surfaces(plan, lines(GRID / f"{task}.jsonl"), measured)
        whole[task] = f"{len(grids)} of {len(plan.methods)} methods"
        for name, search in SEARCHES.items():
            rows = [row for surface in grids.values() for row in regrets(surface, search)]
            if rows:
                found[name][task] = rows
    tables = {
        name: {task: told(rows) for task, rows in by_task.items()}
        | ({"all": told([row for rows in by_task.values() for row in rows])} if by_task else {})
        for name, by_task in found.items()
    }
    RESULT.write_text(json.dumps({"whole": whole, "regret": tables}, indent=1) + "\n", encoding="utf-8")
    print(f"grids: {', '.join(f'{task} {count}' for task, count in whole.items())}\n")
    print("| search | task | searches | median regret | 95% | worst | share of the grid | at most |")
    print("|---|---|---|---|---|---|---|---|")
    for name, by_task in tables.items():
        for task, row in by_task.items():
            print(f"| {name} | {task} | " + " | ".join(f"{value:g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()

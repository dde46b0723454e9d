"""How far from the best rate `lr: auto` ends: what it measures, held against the grid.

    python benchmarks/study/auto.py                    what has no line yet, then the table
    python benchmarks/study/auto.py --seeds 1          fewer drawings of the batches that it tries rates on

Between two rates of the grid the truth is taken to be straight over the logarithm; beyond its ends that of the end.  A
line of benchmarks/study/grid/auto.jsonl is one rate that was measured, with the losses that it was chosen by.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from grid import DATA, GRID, PLANS, Plan, data_of, lines
from regret import Surface, surfaces, told

from spectune.compare.candidates import FULL, rate
from spectune.compare.config import CompareConfig

FOUND = GRID / "auto.jsonl"


def config_of(task: str, plan: Plan) -> CompareConfig:
    """Return the comparison whose runs a grid holds."""
    return CompareConfig(
        **plan.keys, data=str(data_of(plan)), output=str(DATA / task), methods=list(plan.methods), general=None
    )


def measure(task: str, plan: Plan, methods: Sequence[str], seeds: int) -> None:
    """Measure the rates that have no line yet."""
    from spectune.compare.bench import Bench
    from spectune.errors import SpectuneError
    from spectune.training.rate import find_rate

    there = {(line["task"], line["method"], line["seed"]) for line in lines(FOUND)}
    left = [(m, s) for m in methods for s in range(seeds) if (task, m, s) not in there]
    bench = Bench(config_of(task, plan)) if left else None
    for method, seed in left:
        assert bench is not None
        trial = bench.config.for_trial(method, None, seed, bench.steps, bench.steps)
        line: dict[str, Any] = {"task": task, "method": method, "seed": seed}
        try:
            found = find_rate(trial, bench.model, bench.tokenizer, bench.parts.records["train"])
            line |= {"lr": found.rate, "steps": found.steps, "tried": [list(each) for each in found.tried]}
        except SpectuneError as error:
            line |= {"lr": None, "error": str(error)}
        with FOUND.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def truth_at(surface: Surface, rates: dict[int, float], lr: float) -> float:
    """Return what a grid says of a rate that may lie between two of its own."""
    places = sorted(rates)
    known = [math.log(rates[place]) for place in places]
    return float(np.interp(math.log(lr), known, [surface.truth[place] for place in places]))


def main() -> None:
    """Measure, and print regret beside that of the methods' own rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    rows, off = [], []
    for task, plan in PLANS.items():
        grids = surfaces(plan, lines(GRID / f"{task}.jsonl"))
        measure(task, plan, [method for method in grids if method != FULL], seeds)
        config = config_of(task, plan)
        for line in lines(FOUND):
            surface = grids.get(line["method"]) if line["task"] == task else None
            if surface is None or line["lr"] is None:
                continue
            rates = {place: rate(config, line["method"], place) or 0.0 for place in plan.places}
            best = max(surface.truth, key=lambda place: surface.truth[place])
            lost = 100 * (surface.truth[best] - truth_at(surface, rates, line["lr"]))
            own = 100 * (surface.truth[best] - surface.truth[0])
            octaves = math.log2(line["lr"] / rates[best])
            rows.append((lost, 0.0))
            off.append(octaves)
            print(f"{task} {line['method']}: {line['lr']:.2g} is {octaves:+.1f} octaves from the best, regret "
                  f"{lost:.1f} points; the method's own rate {own:.1f}")  # fmt: skip
    if rows:
        near = sum(lost <= 1 for lost, _ in rows) / len(rows)
        print(
            json.dumps(
                {**told(rows), "within 1 point": round(near, 2), "octaves off, median": round(float(np.median(off)), 2)}
            )
        )


if __name__ == "__main__":
    main()

"""Every method at every rate of its ladder with every seed: what a search is judged on.

    python benchmarks/study/grid.py                              every task, what has no line yet
    python benchmarks/study/grid.py question-types film-reviews  some tasks
    python benchmarks/study/grid.py question-types --methods svf pissa:rank=16

A run is a line of benchmarks/study/grid/TASK.jsonl, appended when it ends: so that a grid goes on where it stopped, and
is whole method by method.  Each line holds the looks at the fold of its seed, and the test.  The runs are hours:

    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/study/grid.py &
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
GRID = HERE / "grid"
DATA = Path("runs/grid")
ENCODER_METHODS = [
    *("lora:rank=16", "pissa:rank=16", "svf", "milora:rank=16", "svft:pattern=banded,width=8", "lora_xs:rank=16"),
    *("dora:rank=16", "adalora:rank=16", "full", "dora:inner=pissa,rank=16", "dora:inner=svf"),
]
DECODER_METHODS = ["lora:rank=16", "pissa:rank=16", "svf", "milora:rank=16", "lora_xs:rank=16", "dora:rank=16"]
ENCODER: dict[str, Any] = {
    "model": "minilm-l6",
    "task": "classify",
    "batch_size": 16,
    "max_steps": 32,
    "max_length": 64,
    "gradient_checkpointing": False,
    "validation": 0.2,
    "test": 0.25,
}
DECODER: dict[str, Any] = {
    "model": "smollm2-135m",
    "task": "sft",
    "metric": "loss",
    "batch_size": 4,
    "max_steps": 24,
    "max_length": 64,
    "validation": 0.05,
    "test": 0.1,
    "gradient_checkpointing": False,
    "dtype": "fp32",
}


class Plan(NamedTuple):
    """A grid.

    Args:
        records: what makes the data.
        keys: of the comparison.
        methods: in the order in which they run.
        places: of each method's ladder, whose middle is its own rate.
        seeds: at each.
    """

    records: str
    keys: dict[str, Any]
    methods: Sequence[str]
    places: Sequence[int]
    seeds: int


PLANS = {
    "question-types": Plan("question-types", ENCODER, ENCODER_METHODS, range(-2, 5), 5),
    "film-reviews": Plan("film-reviews", {**ENCODER, "max_length": 32}, ENCODER_METHODS, range(-2, 5), 5),
    "dialogue": Plan("dialogue", DECODER, DECODER_METHODS, range(-2, 3), 3),
}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file, without a last one that was not written to its end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def missing(plan: Plan, methods: Sequence[str], done: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """Give what has no line: a method, a place and a seed; the middle of the ladder first."""
    there = {(line["method"], line["place"], line["seed"]) for line in done}
    for method in methods:
        for place in sorted(plan.places, key=lambda p: (abs(p), p)):
            for seed in range(plan.seeds):
                if (method, place, seed) not in there:
                    yield method, place, seed


def data_of(plan: Plan) -> Path:
    """Return the file of a task's records, which is then there."""
    sys.path.insert(0, str(HERE))
    try:
        from tasks import CANDIDATES
    finally:
        sys.path.remove(str(HERE))
    from spectune.compare.presets import write_records

    path = DATA / f"{plan.records}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, CANDIDATES[plan.records][0]())
    return path


def fill(task: str, plan: Plan, methods: Sequence[str], data: Path, path: Path) -> None:
    """Run what is missing of a grid, and append a line for each run."""
    from spectune.compare.bench import Bench
    from spectune.compare.candidates import rate
    from spectune.compare.config import CompareConfig
    from spectune.compare.trial import Trial
    from spectune.errors import SpectuneError

    left = list(missing(plan, methods, lines(path)))
    if not left:
        return
    config = CompareConfig(**plan.keys, data=str(data), output=str(DATA / task), methods=list(methods), general=None)
    config.check()
    bench = Bench(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text and not text.endswith("\n"):  # a line that was not written to its end
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    for i, (method, place, seed) in enumerate(left):
        lr = rate(config, method, place)
        line: dict[str, Any] = {"method": method, "place": place, "lr": lr, "seed": seed}
        start = time.perf_counter()
        try:
            result = bench.run(Trial(method, lr, seed, "final"))
        except (SpectuneError, RuntimeError) as error:
            line |= {"error": " ".join(str(error).split()), "looks": [], "losses": [], "test": None}
        else:
            by_step = {entry["step"]: entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry}
            line |= {
                "error": None,
                "looks": [[look["step"], round(look["value"], 6), look["right"]] for look in result["looks"]],
                "losses": [round(by_step[look["step"]], 6) for look in result["looks"]],
                "test": {key: round(value, 6) for key, value in result["test"].items()},
            }
        line["seconds"] = round(time.perf_counter() - start, 2)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        told = line["error"] or line["test"]
        print(f"{time.strftime('%H:%M:%S')} {task} {i + 1}/{len(left)} {method} {lr:g} {seed}: {told}", flush=True)


def main() -> None:
    """Fill the grids that are asked for, method by method over the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=", ".join(PLANS))
    parser.add_argument("--methods", nargs="*", help="these alone")
    given = parser.parse_args()
    tasks = given.tasks or list(PLANS)
    for method in dict.fromkeys(method for task in tasks for method in PLANS[task].methods):
        for task in tasks:
            plan = PLANS[task]
            if method in plan.methods and method in (given.methods or plan.methods):
                fill(task, plan, [method], data_of(plan), GRID / f"{task}.jsonl")


if __name__ == "__main__":
    main()

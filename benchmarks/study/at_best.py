"""The methods at their best rates of the grid: what is left of a comparison when nothing was searched too little.

    python benchmarks/study/at_best.py

A method's rate is the one whose runs were best on the validation folds, in the mean over all seeds; what is compared is
the test, seed by seed.  Methods whose grid is not whole yet are left out.  Writes the part of docs/study.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from claims import FULL, LORA, MARGIN, MILORA, PISSA, SVF, SVFT, XS
from control import CONTROL, FOUND, TASK
from grid import GRID, PLANS, lines
from marked import put
from regret import Surface, best_place, metric_of, surfaces

from spectune.compare.config import LESS
from spectune.compare.report.statistics import paired_difference

PAGE = GRID.parents[2] / "docs" / "study.md"
PAIRS = [
    (SVF, LORA),
    (SVFT, SVF),
    (PISSA, MILORA),
    (PISSA, LORA),
    (XS, LORA),
    ("dora:rank=16", LORA),
    ("dora:inner=pissa,rank=16", PISSA),
    ("dora:inner=svf", SVF),
    ("adalora:rank=16", LORA),
    (LORA, FULL),
    (PISSA, CONTROL),
    (CONTROL, LORA),
]


def named(surfaces: Mapping[str, Surface], method: str) -> str | None:
    """Return a method as a grid names it, which may say more of it."""
    return next((name for name in surfaces if name == method or name.startswith(f"{method},")), None)


def compared(found: Mapping[str, Surface], percent: bool) -> list[list[str]]:
    """Return a row for each pair of methods that are whole: the test of each, and the difference with its interval."""
    rows, scale = [], 100 if percent else 1
    for pair in PAIRS:
        one, other = (named(found, method) for method in pair)
        if one is None or other is None:
            continue
        places = [best_place(found[name]) for name in (one, other)]
        values = [
            [found[name].tests[place, seed] for seed in range(found[name].seeds)]
            for name, place in zip((one, other), places, strict=True)
        ]
        test = paired_difference(*values)
        assert test.low is not None
        assert test.high is not None
        tests = [f"{scale * abs(float(np.mean(each))):.{1 if percent else 3}f}" for each in values]
        interval = f"{scale * test.mean:+.2g} ({scale * test.low:+.2g} to {scale * test.high:+.2g})"
        rows.append([f"`{one}`", f"`{other}`", *tests, interval, verdict(test.low, test.high)])
    return rows


def verdict(low: float, high: float) -> str:
    """Return what an interval of a difference says, where less than the margin is none."""
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "the same, within the margin" if low > -MARGIN and high < MARGIN else "open"


def main() -> None:
    """Print the tables, and put them on their page."""
    parts = []
    for task, plan in PLANS.items():
        percent = metric_of(plan) not in LESS
        held = [*lines(GRID / f"{task}.jsonl"), *(lines(FOUND) if task == TASK else ())]
        rows = compared(surfaces(plan, held), percent)
        if rows:
            unit = "points" if percent else "nats"
            head = ["method", "beside", "its test", "the other's", f"difference, {unit}", "so that it is"]
            text = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
            parts.append(f"**{task}**: {metric_of(plan)}\n\n{text}")
    made = "\n\n".join(parts)
    print(made)
    put(PAGE, "at-best", f"{made}\n")


if __name__ == "__main__":
    main()

"""What becomes of the rates that `lr: auto` measures by 24 steps in a run of 200: as they are for the grids' 32 steps,
less by the square root of the steps, and less by the steps.

    python benchmarks/study/longer.py      what has no line yet, then the table

A line of benchmarks/study/grid/longer.jsonl is one run on question-types.
"""

from __future__ import annotations

import json

from claims import LORA, SVF
from grid import GRID, PLANS, lines
from marked import put
from run import settings

TASK, STEPS = "question-types", 200
FOUND = GRID / "longer.jsonl"
PAGE = GRID.parents[2] / "docs" / "study.md"
METHODS, POWERS, SEEDS = (LORA, SVF), (0.0, 0.5, 1.0), 1


def fill() -> None:
    """Run what is missing."""
    from spectune.compare.bench import Bench
    from spectune.compare.trial import Trial

    there = {(line["method"], line["power"], line["seed"]) for line in lines(FOUND)}
    wanted = [(m, p, s) for s in range(SEEDS) for m in METHODS for p in POWERS if (m, p, s) not in there]
    if not wanted:
        return
    short = {line["method"]: line["lr"] for line in lines(GRID / "auto.jsonl") if line["task"] == TASK}
    config = settings(TASK, ["until=steps", f"max_steps={STEPS}"])
    config.check()
    bench = Bench(config)
    for method, power, seed in wanted:
        lr = float(f"{short[method] * (PLANS[TASK].keys['max_steps'] / STEPS) ** power:.2g}")
        result = bench.run(Trial(method, lr, seed, "final"))
        looks = [[look["step"], round(look["value"], 4)] for look in result["looks"]]
        line = {"method": method, "power": power, "seed": seed, "lr": lr, "looks": looks, "test": result["test"]}
        with FOUND.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def table() -> str:
    """Return a row for each method: each rate with what it came to."""
    rows = ["| method | as for 32 steps | less by the square root | less by the steps |", "|---|---|---|---|"]
    held = lines(FOUND)
    for method in METHODS:
        cells = []
        for power in POWERS:
            own = [line for line in held if (line["method"], line["power"]) == (method, power)]
            right = sum(line["test"]["accuracy"] for line in own) / len(own)
            cells.append(f"{100 * right:.1f} ({own[0]['lr']:g})")
        rows.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    fill()
    print(table())
    put(PAGE, "longer", f"{table()}\n")

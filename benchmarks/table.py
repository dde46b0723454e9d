"""Print the tables of docs/spectral.md and docs/plan.md from results/decompose.json and results/plan.json."""

from __future__ import annotations

import json
from typing import Any

from _machine import RESULTS

PLANNED = {  # a row of the table: the part of the results, and whether its rows of seconds are meant
    "start-up": ("setup", False),
    "step over the floor": ("step", False),
    "step, seconds": ("step", True),
    "memory": ("memory", False),
}


def row(name: str, figures: dict[str, Any]) -> str:
    target = figures["target"]
    faster = name.endswith("niter 16")
    wanted = "faster" if faster else f">= {target:g}" if target else ""
    reached = {True: "yes", False: "no", None: ""}[figures["reached"]]
    if faster:
        reached += f", error {figures['error_ratio']:g} times smaller"
    ours, theirs = (f"{figures[side]:.3g}" for side in ("ours_s", "theirs_s"))
    cells = (name, ours, theirs, f"{figures['ratio']:g}", wanted, reached, figures["runs"], figures["load"])
    return f"| {' | '.join(map(str, cells))} |"


def planned(rows: dict[str, Any], seconds: bool) -> str:
    """Return how many predictions are within 20%, and the range of their ratios to what was measured."""
    chosen = [row for name, row in rows.items() if name.endswith(" seconds") == seconds]
    ratios = [row["ratio"] for row in chosen]
    within = sum(row["within_20_percent"] for row in chosen)
    return f"{within} of {len(chosen)}, {min(ratios):.2f} to {max(ratios):.2f}"


def print_plan() -> None:
    results = json.loads((RESULTS / "plan.json").read_text(encoding="utf-8"))["results"]
    columns = [key.removeprefix("memory ") for key in results if key.startswith("memory ")]
    print(f"| | {' | '.join(columns)} |")
    print(f"|{'---|' * (len(columns) + 1)}")
    for what, (part, seconds) in PLANNED.items():
        print(f"| {what} | {' | '.join(planned(results[f'{part} {column}'], seconds) for column in columns)} |")


def print_decompose() -> None:
    rows = json.loads((RESULTS / "decompose.json").read_text(encoding="utf-8"))["rows"]
    print("| what / against | ours, s | theirs, s | ratio | target | reached | runs | load |")
    print("|---|---|---|---|---|---|---|---|")
    for name, figures in sorted(rows.items()):
        print(row(name, figures))


if __name__ == "__main__":
    print_decompose()
    print()
    print_plan()

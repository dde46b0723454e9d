"""Print the tables of docs/spectral.md, docs/plan.md and docs/performance.md from the results of decompose.py, plan.py
and decode.py.

Where there are results of several processors a cell has the worst and the best.
"""

from __future__ import annotations

from typing import Any

from _machine import saved, spread

PLANNED = {  # a row of the table: the part of the results, and whether its rows of seconds are meant
    "start-up": ("setup", False),
    "step over the floor": ("step", False),
    "step, seconds": ("step", True),
    "memory": ("memory", False),
}


def row(name: str, figures: dict[str, dict[str, Any]]) -> str:
    """Return a row of the table of decompositions, given its figures by processor."""
    every = list(figures.values())
    worst = min(every, key=lambda found: found["ratio"])
    faster = name.endswith("niter 16")
    wanted = "faster" if faster else f">= {worst['target']:g}" if worst["target"] else ""
    reached = {True: "yes", False: "no", None: ""}[worst["reached"]]
    if faster:
        reached += f", error {min(found['error_ratio'] for found in every):g} times smaller"

    def of(key: str, shown: str, best: Any = min) -> str:
        return spread({where: found[key] for where, found in figures.items()}, shown.format, best)

    cells = (name, of("ours_s", "{:.3g}"), of("theirs_s", "{:.3g}"), of("ratio", "{:g}", max), wanted, reached)
    return f"| {' | '.join((*cells, of('runs', '{}', max), of('load', '{}')))} |"


def planned(runs: list[dict[str, Any]], seconds: bool) -> str:
    """Return how many predictions are within 20%, and the range of their ratios to what was measured."""
    found = []
    for rows in runs:
        chosen = [row for name, row in rows.items() if name.endswith(" seconds") == seconds]
        ratios = [row["ratio"] for row in chosen]
        within = sum(row["within_20_percent"] for row in chosen)
        found.append((within / len(chosen), f"{within} of {len(chosen)}, {min(ratios):.2f} to {max(ratios):.2f}"))
    return " / ".join(dict.fromkeys(text for _, text in (min(found), max(found))))


def print_plan() -> None:
    runs = [run["results"] for run in saved("plan").values()]
    columns = list(dict.fromkeys(key.removeprefix("memory ") for run in runs for key in run if key[:7] == "memory "))
    print(f"| | {' | '.join(columns)} |")
    print(f"|{'---|' * (len(columns) + 1)}")
    for what, (part, seconds) in PLANNED.items():
        of = [[run[f"{part} {column}"] for run in runs if f"{part} {column}" in run] for column in columns]
        print(f"| {what} | {' | '.join(planned(found, seconds) if found else '' for found in of)} |")


def print_decompose() -> None:
    runs = {where: run["rows"] for where, run in saved("decompose").items()}
    print("| what / against | ours, s | theirs, s | ratio | target | reached | runs | load |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sorted({name for rows in runs.values() for name in rows}):
        print(row(name, {where: rows[name] for where, rows in runs.items() if name in rows}))


def print_decode() -> None:
    """Print how many times as long as the base each side takes, for 1, 8 and 64 rows."""
    runs = {where: run["results"] for where, run in saved("decode").items()}
    dtypes = list(dict.fromkeys(dtype for run in runs.values() for dtype in run))
    kinds = [(kind, dtype) for kind in ("decode", "prefill", "generate") for dtype in dtypes]
    sides = list(dict.fromkeys(side for run in runs.values() for dtype in run for side in run[dtype]))

    def cell(side: str, kind: str, dtype: str) -> str:
        of = {where: run.get(dtype, {}).get(side, {}) for where, run in runs.items()}
        found = (
            spread(
                {where: rows.get(n, {}).get(kind, {}).get("over_base") for where, rows in of.items()}, "{:.2f}".format
            )
            for n in ("1", "8", "64")
        )
        return " / ".join(value for value in found if value)

    print(f"| | {' | '.join(f'{kind}, {dtype}' for kind, dtype in kinds)} |")
    print(f"|{'---|' * (len(kinds) + 1)}")
    for side in sides:
        print(f"| {side} | {' | '.join(cell(side, kind, dtype) for kind, dtype in kinds)} |")


if __name__ == "__main__":
    print_decompose()
    print()
    print_plan()
    print()
    print_decode()

"""Print the table of docs/spectral.md from results/decompose.json."""

from __future__ import annotations

import json
from typing import Any

from _machine import RESULTS


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


def main() -> None:
    rows = json.loads((RESULTS / "decompose.json").read_text(encoding="utf-8"))["rows"]
    print("| what / against | ours, s | theirs, s | ratio | target | reached | runs | load |")
    print("|---|---|---|---|---|---|---|---|")
    for name, figures in sorted(rows.items()):
        print(row(name, figures))


if __name__ == "__main__":
    main()

"""What benchmarks share: where results go, with the machine and the versions, and this process's memory (Linux).

The results of a benchmark lie in results/<name>.<processor>.json, one file for each processor that it ran on, so that
who reads them can show the worst and the best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectune.pages.about import describe

RESULTS = Path(__file__).parent / "results"


def processor(machine: dict[str, Any] | None = None) -> str:
    """Return the name of the accelerator, or else of the processor, of a machine, as a part of a file name.

    Args:
        machine: as `describe` returns it; this one if not given.
    """
    machine = describe() if machine is None else machine
    return re.sub(r"[^a-z0-9]+", "-", str(machine["accelerator"] or machine["processor"]).lower()).strip("-")


def path_of(name: str) -> Path:
    """Return the file of a benchmark's results on this machine."""
    return RESULTS / f"{name}.{processor()}.json"


def save(name: str, results: dict[str, Any]) -> Path:
    """Write a benchmark's results, with the machine, to results/<name>.<processor>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = path_of(name)
    path.write_text(json.dumps({"machine": describe(), **results}, indent=2) + "\n", encoding="utf-8")
    return path


def saved(name: str) -> dict[str, dict[str, Any]]:
    """Return a benchmark's results by the processor that they are from; none where it was never run."""
    files = sorted(RESULTS.glob(f"{name}.*.json"))
    return {file.name.split(".")[1]: json.loads(file.read_text(encoding="utf-8")) for file in files}


def spread(values: dict[str, float | None], shown: Callable[[float], str], best: Callable[..., float] = min) -> str:
    """Return the figure of the one processor that has it, or the worst and the best of several.

    Args:
        values: by processor; None where it has none.
        shown: writes a figure.
        best: `min` or `max`.
    """
    found = [value for value in values.values() if value is not None]
    if not found:
        return ""
    worst, top = (max(found), min(found)) if best is min else (min(found), max(found))
    return shown(top) if shown(worst) == shown(top) else f"{shown(worst)} to {shown(top)}"


def resident(field: str) -> int:
    """Return VmRSS, the resident size now, or VmHWM, its peak since `forget_peak`, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Start VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

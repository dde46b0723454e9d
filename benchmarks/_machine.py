"""What benchmarks share: where results go, with the machine and the versions, and this process's memory (Linux)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectune.pages.about import describe

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: dict[str, Any]) -> Path:
    """Write a benchmark's results, with the machine, to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **results}, indent=2) + "\n", encoding="utf-8")
    return path


def resident(field: str) -> int:
    """Return VmRSS, the resident size now, or VmHWM, its peak since `forget_peak`, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Start VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

"""Where a benchmark's results go, with the machine and the versions that it ran on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectune.reports.about import describe

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: dict[str, Any]) -> Path:
    """Write a benchmark's results, with the machine, to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **results}, indent=2) + "\n", encoding="utf-8")
    return path

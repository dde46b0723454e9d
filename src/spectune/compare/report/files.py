"""The report of a comparison as files: one HTML page, JSON, CSV, and pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from spectune.compare.report.figures import write_pictures
from spectune.compare.report.model import Document, MethodRow
from spectune.compare.report.page import report_page
from spectune.storage import write_atomically


def write_report(document: Document, out: Path) -> list[Path]:
    """Write the report's files and return their paths.

    report.html, report.json, report.csv (a line a method), runs.csv (a line a run), pareto and curves as png and svg.

    Args:
        document: what `spectune.compare.report.document.document` returned.
        out: the folder, made if need be.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.html": report_page(document),
        "report.json": json.dumps(document.model_dump(), indent=1, allow_nan=False) + "\n",
        "report.csv": _csv([_flat(row) for row in document.methods]),
        "runs.csv": _csv([trial.model_dump() for trial in document.trials]),
    }
    for name, text in texts.items():
        write_atomically(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8", newline=""))
    return [*(out / name for name in texts), *write_pictures(document, out)]


def _csv(lines: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: MethodRow) -> dict[str, object]:
    """Return a method's row with intervals and differences as columns of their own."""
    plain = ("method", "ran", "lr", "steps", "trainable_parameters", "adapter_bytes", "setup_seconds", "step_seconds")
    plain += ("step_over_floor", "peak_bytes", "tokens_per_second", "edge", "cost_seconds")
    parts = {
        **dict.fromkeys(("metric", "loss", "gap", "forgetting"), ("mean", "low", "high")),
        "difference": ("mean", "low", "high", "p", "corrected_p", "over", "beyond_chance"),
        "over_records": ("mean", "low", "high", "p"),
    }
    nested = {f"{key}_{name}": getattr(getattr(row, key), name, None) for key, names in parts.items() for name in names}
    sensitive = row.sensitivity
    nested["octaves"] = None if sensitive is None else sensitive.octaves
    nested["fell_apart"] = " ".join(map(str, row.fell_apart))
    return {"method": row.method, "seeds": len(row.seeds), **{key: getattr(row, key) for key in plain}, **nested}

"""The command that trains one of the methods compared, as it was trained there."""

from __future__ import annotations

import re
import shlex

import yaml

from spectune.compare.report.model import Document, MethodRow
from spectune.training.config import TrainConfig
from spectune.training.registry import options_of

_SET = ("model", "data", "output", "task", "method", "lr", "epochs", "max_steps", "seed", "overwrite")


def train_command(document: Document, row: MethodRow) -> str | None:
    """Return the `spectune train` command for a method, or None where train has none (base, full).

    Args:
        document: with the header.
        row: of "methods".
    """
    method = row.method
    if method in ("base", "full") or not row.ran:
        return None
    given = yaml.safe_load(document.config or "") or {}
    keys = {*TrainConfig.model_fields, *options_of(document.task).model_fields}
    pairs = {
        "model": document.model,
        "data": document.data,
        "output": "runs/" + re.sub(r"[^\w.=-]+", "-", method),
        "task": document.task,
        "method": method,
        "lr": row.lr,
        "max_steps": row.steps if document.until == "plateau" else document.steps,
        "schedule": "constant" if document.until == "plateau" else None,
        "seed": row.seeds[0],
        **{key: given[key] for key in given if key in keys and key not in _SET},
    }
    return " ".join(
        ["spectune train", *(shlex.quote(f"{key}={_text(v)}") for key, v in pairs.items() if v is not None)]
    )


def _text(value: object) -> str:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()

"""Comparisons that need nothing but the embedded models and data."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectune.bases import sources
from spectune.errors import SpectuneError, nearest
from spectune.storage import write_atomically

_QUICK: dict[str, Any] = {
    "model": "minilm-l6",
    "task": "classify",
    "output": "runs/compare-quick",
    "methods": ["base", "full", "lora", "svf", "pissa"],
    "max_steps": 32,
    "batch_size": 16,
    "max_length": 64,
    "seeds": 3,
    "lrs": 3,
    "search": 4,
    "validation": 0.2,
    "test": 0.25,
    "workers": 2,
}


def preset(name: str) -> dict[str, object]:
    """Return the settings of a preset, whose data is then there.

    Args:
        name: "quick".

    Raises:
        SpectuneError: another name, or a data package that is not installed.
    """
    if name != "quick":
        raise SpectuneError(f"preset: {name!r} is not known{nearest(name, ['quick'])} (known: quick)")
    path = Path(_QUICK["output"]) / "question-types.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, question_types(700))
    return {**_QUICK, "data": str(path)}


def rated_reviews(count: int, source: str = "movieReviewSnippets") -> list[dict[str, str]]:
    """Return sentences of reviews with "positive" or "negative", by their mean rating, without what is lukewarm.

    Args:
        count: of them, at most.
        source: as `sources.reviews` knows it.

    Raises:
        SpectuneError: the data package is not installed.
    """
    records = [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in sources.reviews(source).items()
        if abs(rating) >= 1
    ]
    random.Random(0).shuffle(records)
    return records[:count]


def question_types(count: int) -> list[dict[str, str]]:
    """Return questions, each once, with what they ask for: a person, a place, a number, ...

    Raises:
        SpectuneError: the data package is not installed.
    """
    labels = {question.strip(): label.partition(":")[0] for label, question in sources.questions() if question.strip()}
    records = [{"text": text, "label": label} for text, label in labels.items()]
    random.Random(0).shuffle(records)
    return records[:count]


def write_records(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Write records as JSON lines."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

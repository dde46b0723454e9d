"""What several modules need of sequences and of values."""

from __future__ import annotations

from collections.abc import Sequence


def says_yes(value: object) -> bool | None:
    """Return whether a value says true or false, also as a text, which is all that tables hold; None for neither."""
    said = str(value).strip().lower().removesuffix(".0")
    return True if said in ("true", "1") else False if said in ("false", "0") else None


def in_common(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))

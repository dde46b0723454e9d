"""Sizes as people write them, and the method that fits a budget of trained parameters."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from spectune.methods import Method


def size_field(method: Method) -> str | None:
    """Return the field that sets how much trains: rank, or the width of SVFT's patterns; None where there is none.

    DoRA has that of the method inside.
    """
    inner = getattr(method, "inner", None)
    if isinstance(inner, Method):
        return size_field(inner)
    if hasattr(method, "rank"):
        return "rank"
    return "width" if getattr(method, "pattern", "plain") != "plain" else None


def within_budget(method: Method, shapes: Iterable[tuple[int, ...]], budget: int) -> Method | None:
    """Return the method with the largest rank or width that trains at most `budget` values, or None.

    Args:
        method: where to start from; its other fields stay, but for AdaLoRA's initial rank, which follows the rank.
        shapes: (out, in) of each weight.
        budget: trained values.
    """
    counts = Counter(shapes)
    field = size_field(method)

    def fits(sized: Method) -> bool:
        return sum(count * sized.fit(*shape).parameter_count(*shape) for shape, count in counts.items()) <= budget

    if field is None:
        return method if fits(method) else None
    largest = max(map(min, counts))  # beyond which nothing is gained, and a rank is not taken
    low, high = (0, largest + 1) if field == "rank" else (-1, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_sized(method, field, middle)) else (low, middle)
    return _sized(method, field, low) if low >= (1 if field == "rank" else 0) else None


def least_of(method: Method) -> Method:
    """Return the method at its smallest rank or width."""
    field = size_field(method)
    return method if field is None else _sized(method, field, 1 if field == "rank" else 0)


def _sized(method: Any, field: str, size: int) -> Method:
    inner = getattr(method, "inner", None)
    if isinstance(inner, Method):
        return dataclasses.replace(method, inner=_sized(inner, field, size))
    changes: dict[str, object] = {field: size}
    if getattr(method, "initial_rank", None) is not None:
        changes["initial_rank"] = None
    return dataclasses.replace(method, **changes)

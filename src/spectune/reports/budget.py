"""Sizes as people write them, and the method that fits a budget of trained parameters."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from spectune.errors import SpectuneError
from spectune.methods import Method

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_count(text: str | int, what: str = "budget") -> int:
    """Return the number that `100k`, `1.5M` or `2e6` stands for.

    Raises:
        SpectuneError: it is no such number, or below one.
    """
    found = re.fullmatch(r"\s*([\d._]+(?:e\d+)?)\s*([kmgbt]?)\s*", str(text).lower())
    value = _number(found[1]) * _FACTORS[found[2]] if found else 0.0
    if not value >= 1:
        raise SpectuneError(f"{what}: {text!r} is not a number of parameters such as 100k or 1.5M")
    return int(value)


def parse_bytes(text: str | int, what: str = "memory") -> int:
    """Return the bytes that `24GB` (10^9 each), `16GiB` (2^30 each) or a plain number stand for.

    Raises:
        SpectuneError: it is no such size, or below one.
    """
    found = re.fullmatch(r"\s*([\d._]+(?:e\d+)?)\s*([kmgt]?i?b|[kmgt]|)\s*", str(text).lower())
    value = 0.0
    if found:
        unit = found[2]
        value = _number(found[1]) * (_BYTES.get(unit) or _FACTORS[unit.removesuffix("b")] if unit != "b" else 1)
    if not value >= 1:
        raise SpectuneError(f"{what}: {text!r} is not a size such as 24GB or 16GiB")
    return int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


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


def within_budget(method: Method, shapes: Iterable[tuple[int, int]], budget: int) -> Method | None:
    """Return the method with the largest rank or width that trains at most `budget` values, or None.

    Args:
        method: where to start from; its other fields stay, but for AdaLoRA's initial rank, which follows the rank.
        shapes: (out, in) of each weight.
        budget: trained values.
    """
    counts = Counter(shapes)
    field = size_field(method)

    def fits(sized: Method) -> bool:
        trained = sum(count * sized.parameter_count(*shape) for shape, count in counts.items())
        return trained <= budget and not any(sized.check(*shape) for shape in counts)

    if field is None:
        return method if fits(method) else None
    low, high = (0, budget + 1) if field == "rank" else (-1, max(map(min, counts)))
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
    changes: dict[str, Any] = {field: size}
    if getattr(method, "initial_rank", None) is not None:
        changes["initial_rank"] = None
    return dataclasses.replace(method, **changes)

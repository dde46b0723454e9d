"""Counts and sizes as people write them."""

from __future__ import annotations

import re

from spectune.errors import SpectuneError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


_GIGABYTES_BELOW = 10**5  # a plain number
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
    """Return the bytes that `24GB` or `24` (10^9 each), `16GiB` (2^30 each) or a number from 10^5 on stand for.

    Raises:
        SpectuneError: it is no such size, or below one.
    """
    found = re.fullmatch(r"\s*([\d._]+(?:e\d+)?)\s*([kmgt]?i?b|[kmgt]|)\s*", str(text).lower())
    value = 0.0
    if found:
        unit = found[2]
        value = _number(found[1]) * (_BYTES.get(unit) or _FACTORS[unit.removesuffix("b")] if unit != "b" else 1)
        if not unit and value < _GIGABYTES_BELOW:  # as people say it of a device
            value *= 10**9
    if not value >= 1:
        raise SpectuneError(f"{what}: {text!r} is not a size such as 24GB or 16GiB")
    return int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def gigabytes(size: float) -> str:
    """Return a size as people read it, in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 1000 else f"{size / 1000:.3g} TB"

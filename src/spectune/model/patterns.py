"""Patterns of layers' names: whole names, suffixes, regexes, modules around layers, and numbers of blocks."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import partial
from types import MappingProxyType

import regex

from spectune.errors import SpectuneError, nearest
from spectune.patterns import LONGEST

Patterns = str | Iterable[str]
NONE: Mapping[str, str] = MappingProxyType({})
_SECONDS = 2.0  # for one pattern and all names
_FIRST_NUMBER = r".*?\.[^.]*\.(?P<number>\d+)\."  # the block's, and not an expert's further on


class Precise(IntEnum):
    """How much of a name a pattern says; the more goes before the less."""

    AROUND = 0
    SUFFIX = 1
    REGEX = 2
    WHOLE = 3


def matching(
    patterns: Patterns,
    names: list[str],
    what: str,
    *,
    regex: bool = False,
    others: Mapping[str, str] | None = None,
    alone: Collection[str] = (),
    tensors: Mapping[str, str] = NONE,
) -> list[str]:
    """Return the names of layers that patterns match, in the patterns' order.

    Args:
        patterns: see `found`.
        names: to choose from.
        what: the setting's name, for messages.
        regex: patterns in a list may be regexes too.
        others: names of modules that cannot be adapted, and what they are.
        alone: names that the name of a module around does not stand for.
        tensors: of layers whose weights lie in one tensor, its name, which stands for all of them.

    Raises:
        SpectuneError: a pattern that matches none; the nearest names are listed.
    """
    one = isinstance(patterns, str)
    hits: dict[str, None] = {}
    ask = partial(found, regex=one or regex, loose=regex, others=others, alone=alone, tensors=tensors)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits |= dict.fromkeys(ask(pattern, names, what))
    return list(hits)


def found(
    pattern: str,
    names: Sequence[str],
    what: str,
    *,
    regex: bool,
    loose: bool,
    others: Mapping[str, str] | None = None,
    alone: Collection[str] = (),
    tensors: Mapping[str, str] = NONE,
) -> dict[str, Precise]:
    """Return the names of layers that a pattern matches, and how much of each it says.

    It is the whole name or a suffix at a dot, else a regex, else the name of a module around layers.

    Args:
        pattern: the pattern.
        names: to choose from.
        what: the setting's name, for messages.
        regex: whether it may be a regex of the whole name.
        loose: whether it may be a regex of the whole name or of what follows a dot in it, as PEFT's rank_pattern.
        others: names of modules that cannot be adapted, and what they are.
        alone: names that the name of a module around does not stand for.
        tensors: of layers whose weights lie in one tensor, its name, which stands for all of them.

    Raises:
        SpectuneError: it matches none; the nearest names are listed.
    """
    hits = {n: Precise.WHOLE if n == pattern else Precise.SUFFIX for n in names if _ends(n, pattern)}
    hits |= {n: Precise.SUFFIX for n in names if n not in hits and n in tensors and _ends(tensors[n], pattern)}
    named = {n: kind for n, kind in (others or {}).items() if _ends(n, pattern)}
    if hits and named:
        _say_left_out(pattern, what, named)
    if not hits and not named:
        forms = [pattern] * regex + [rf"(?:.*\.)?(?:{pattern})"] * loose
        for form in forms:
            compiled = Regex(form, what, pattern)
            hits = hits or {n: Precise.REGEX for n in names if compiled.match(n, whole=True)}
            hits = hits or {n: Precise.REGEX for n in names if n in tensors and compiled.match(tensors[n], whole=True)}
        around = re.escape(pattern) if not loose else pattern
        inside = Regex(rf"(?:.*\.)?(?:{around})\..*", what, pattern)
        hits = hits or {n: Precise.AROUND for n in names if n not in alone and inside.match(n, whole=True)}
    if not hits:
        tails = [n.rpartition(".")[2] for n in sorted(names, key=lambda n: n in alone)]
        is_other = f": {next(iter(named))!r} is a {next(iter(named.values()))}" if named else ""
        raise SpectuneError(
            f"{what}: {pattern!r} matches no linear layer{is_other}{nearest(pattern, [*tails, *names])} "
            f"(the model has {', '.join(dict.fromkeys(tails))})"
        )
    return hits


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _say_left_out(pattern: str, what: str, named: Mapping[str, str]) -> None:
    first, kind = next(iter(named.items()))
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    warnings.warn(f"{what}: {pattern!r} names {first!r} ({kind}){more} too, which is left out", stacklevel=5)


class Regex:
    """A regex made of a user's pattern, which has so many seconds for all names together.

    Those of files are matched in bounded steps (`spectune.patterns`); a user's own may look ahead and behind, for which
    there is no such bound, and one such as `(a+)+$` would otherwise never end.

    Args:
        form: the regex.
        what: the setting's name, for messages.
        pattern: what the user gave.

    Raises:
        SpectuneError: it is none, or too long.
    """

    def __init__(self, form: str, what: str, pattern: str) -> None:
        self._told, self._left = f"{what}: {pattern!r:.80}", _SECONDS
        if len(pattern) > LONGEST:
            raise SpectuneError(f"{what}: a pattern of {len(pattern):,} characters; at most {LONGEST:,} are read")
        try:
            re.compile(form)  # regex knows more than Python's own
            self._compiled = regex.compile(form)
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise SpectuneError(f"{self._told} is not a valid regular expression: {error}") from None

    def match(self, name: str, *, whole: bool = False) -> regex.Match[str] | None:
        """Return the match at a name's beginning, or of all of it.

        Raises:
            SpectuneError: the time is over.
        """
        began = time.thread_time()
        try:
            ask = self._compiled.fullmatch if whole else self._compiled.match
            found = ask(name, timeout=self._left, concurrent=False)
        except TimeoutError:
            raise SpectuneError(f"{self._told} takes too long to match: write it more simply") from None
        self._left = max(self._left - (time.thread_time() - began), 0.1)
        return found


def in_blocks(
    names: Sequence[str], numbers: int | Iterable[int] | None, pattern: str | Iterable[str] | None
) -> list[str]:
    """Return the names of layers in some of a model's blocks: PEFT's `layers_to_transform` and `layers_pattern`.

    Args:
        names: to choose from.
        numbers: of the blocks; None or an empty list takes every layer.
        pattern: names or regexes of the lists that hold the blocks; None is the first number in a name.

    Raises:
        SpectuneError: there is no such block or list.
    """
    wanted = [numbers] if isinstance(numbers, int) else list(numbers or ())
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    if not wanted:
        if patterns:
            raise SpectuneError("layers_pattern says where layers_to_transform are: give both, or neither")
        return list(names)
    for number in wanted:
        if isinstance(number, bool) or not isinstance(number, int):
            raise SpectuneError(f"layers_to_transform must be numbers of blocks, not {number!r}")
    lists = [Regex(rf"(?:^|.*?\.)(?:{p})\.(?P<number>\d+)\.", "layers_pattern", p) for p in patterns]
    known = lists or [Regex(_FIRST_NUMBER, "layers_pattern", "the first number")]
    places: dict[str, int] = {}
    for name in names:
        match = next((m for p in known if (m := p.match(name))), None)
        if match is not None and match["number"] is not None:  # as a pattern with brackets of its own may have it
            places[name] = int(match["number"])
    there = sorted(set(places.values()))
    if not there:
        holders = {m[1] for n in names if (m := re.match(r"(?:.*?\.)?([^.]+)\.\d+\.", n))}
        raise SpectuneError(
            f"layers_pattern: {', '.join(map(repr, patterns)) or 'no name'} holds none of the targets' blocks"
            f"{nearest(patterns[0], holders) if patterns else ''} (known: {', '.join(sorted(holders)) or 'none'})"
        )
    for number in wanted:
        if number not in there:
            raise SpectuneError(
                f"layers_to_transform: no target is in block {number} (they are in {there[0]} to {there[-1]})"
            )
    return [name for name in names if places.get(name) in wanted]


def by_pattern(
    patterns: Mapping[str, float], names: Sequence[str], what: str, tensors: Mapping[str, str] = NONE
) -> dict[str, float]:
    """Return the value of each layer that a pattern matches, of the first that does: PEFT's `rank_pattern`.

    Args:
        patterns: a regex of the whole name, or of what follows a dot in it, and the value.
        names: to choose from.
        what: the setting's name, for messages.
        tensors: as for `matching`.

    Raises:
        SpectuneError: a pattern that matches none; the nearest names are listed.
    """
    values: dict[str, float] = {}
    for pattern, value in patterns.items():
        compiled = Regex(rf"(.*\.)?({pattern})$", what, pattern)
        hits = [name for name in names if compiled.match(name) or compiled.match(tensors.get(name, name))]
        if not hits:
            tails = [n.rpartition(".")[2] for n in names]
            raise SpectuneError(
                f"{what}: {pattern!r} matches no target{nearest(pattern, [*tails, *names])} "
                f"(they are {', '.join(dict.fromkeys(tails))})"
            )
        for name in hits:
            values.setdefault(name, value)
    return values

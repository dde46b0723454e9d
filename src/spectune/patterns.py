"""Regular expressions from files, matched in time that is bounded by their length and the name's.

Python's own matcher goes back and tries again, so that `(a+)+b` takes longer than anyone waits.  Here all places that a
match may have come to are kept at once, a set for each part of the pattern.  What that cannot answer (references to
groups, looking ahead or behind) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from spectune.errors import SpectuneError

MOST_PATTERNS = 5_000
LONGEST = 1_000  # characters of a pattern
_DEEPEST = 20  # groups inside each other
_MOST_TIMES = 1_000
_PLAIN = re.compile(r"(?:[\w/\-.]|\\[.\-/])+\Z")

_WORK = 2_000_000  # places looked at for one pattern and name

Places = frozenset[int]


class _Name:
    """A name, and how many places of it may still be looked at."""

    def __init__(self, text: str, pattern: str) -> None:
        self.text, self.pattern, self.left = text, pattern, _WORK

    def look(self, places: Places) -> None:
        self.left -= 1 + len(places)
        if self.left < 0:
            raise SpectuneError(f"the pattern {self.pattern!r:.80} takes too long to match; write it more simply")


_Step = Callable[[_Name, Places], Places]


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern matches all of a name, or all that follows one of its dots, as PEFT's patterns do.

    Raises:
        SpectuneError: it is no regular expression, too long, or one of a kind that is not read.
    """
    if len(pattern) <= LONGEST and _PLAIN.match(pattern):
        return pattern[-1] in (".", name[-1:]) and _plain_matches_end(pattern, name)
    starts = frozenset({0, *(i + 1 for i, letter in enumerate(name) if letter == ".")})
    return len(name) in _compiled(pattern)(_Name(name, pattern), starts)


def _plain_matches_end(pattern: str, name: str) -> bool:
    literal = pattern.replace("\\.", "\0").replace("\\", "")
    start = len(name) - len(literal)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    pairs = zip(literal, name[start:], strict=True)
    return all(p == c or (p == "." and c != "\n") or (p == "\0" and c == ".") for p, c in pairs)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> _Step:
    if len(pattern) > LONGEST:
        raise SpectuneError(f"a pattern of {len(pattern):,} characters is not read; at most {LONGEST:,} are")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        raise SpectuneError(f"{pattern!r:.80} is not a regular expression: {error}") from None
    parser = _Parser(pattern)
    step = parser.alternatives(0)
    if parser.at < len(pattern):
        raise parser.refused()
    return step


class _Parser:
    """Turns a pattern, which Python has compiled, into steps from places in a name to places."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def refused(self) -> SpectuneError:
        return SpectuneError(
            f"the pattern {self.pattern!r:.80} has what is not read from files (at character {self.at + 1}): use "
            "letters, '.', classes in brackets, groups, '|', '*', '+', '?' and '{m,n}'"
        )

    def next_is(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def taken(self, text: str) -> bool:
        found = self.next_is(text)
        self.at += len(text) if found else 0
        return found

    def alternatives(self, depth: int) -> _Step:
        if depth > _DEEPEST:
            raise self.refused()
        steps = [self.sequence(depth)]
        while self.taken("|"):
            steps.append(self.sequence(depth))
        return steps[0] if len(steps) == 1 else lambda name, p: frozenset().union(*(step(name, p) for step in steps))

    def sequence(self, depth: int) -> _Step:
        steps: list[_Step] = []
        while self.at < len(self.pattern) and not self.next_is("|") and not self.next_is(")"):
            steps.append(self.repeated(self.atom(depth)))

        def step(name: _Name, places: Places) -> Places:
            name.look(places)
            for one in steps:
                places = one(name, places) if places else places
            return places

        return step

    def repeated(self, step: _Step) -> _Step:
        counted = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self.pattern, self.at)
        if self.taken("*"):
            least, most = 0, None
        elif self.taken("+"):
            least, most = 1, None
        elif self.taken("?"):
            least, most = 0, 1
        elif counted is not None and (counted[1] or counted[3]):
            self.at = counted.end()
            least = int(counted[1] or 0)
            most = (int(counted[3]) if counted[3] else None) if counted[2] else least
            if max(least, most or 0) > _MOST_TIMES:
                raise self.refused()
        else:
            return step
        if self.next_is("+"):  # which gives nothing back
            raise self.refused()
        self.taken("?")  # as little as possible, which makes no difference to whether it matches
        return _repeat(step, least, most)

    def atom(self, depth: int) -> _Step:
        if self.taken("("):
            if self.next_is("?") and not self.taken("?:"):
                raise self.refused()
            inner = self.alternatives(depth + 1)
            if not self.taken(")"):
                raise self.refused()
            return inner
        if self.taken("^"):
            return lambda name, places: places & {0}
        if self.taken("$"):
            return lambda name, places: places & {len(name.text)}
        start = self.at
        if self.taken("["):
            self.taken("^")
            self.taken("]")
            while not self.taken("]"):
                self.at += 2 if self.next_is("\\") else 1
        elif self.taken("\\"):
            if self.pattern[self.at] in "AbBZxuUN0123456789":
                raise self.refused()
            self.at += 1
        else:
            self.at += 1
        one = re.compile(self.pattern[start : self.at])

        def step(name: _Name, places: Places) -> Places:
            name.look(places)
            return frozenset(i + 1 for i in places if i < len(name.text) and one.match(name.text[i]))

        return step


def _repeat(step: _Step, least: int, most: int | None) -> _Step:
    def repeat(name: _Name, places: Places) -> Places:
        for _ in range(least):
            before, places = places, step(name, places)
            if places == before:  # as it stays, empty or not
                break
        reached, times = places, 0
        while places and (most is None or times < most - least):
            places = step(name, places) - reached
            reached |= places
            times += 1
        return reached

    return repeat

"""Patterns from files mean what they mean to PEFT, and take a bounded time."""

import random
import re

import pytest

from spectune.errors import SpectuneError
from spectune.patterns import matches_end


def pattern(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth == 0 or kind < 0.4:
        return draw.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "1", "x.a"])
    if kind < 0.6:
        return pattern(draw, depth - 1) + pattern(draw, depth - 1)
    if kind < 0.75:
        return f"({draw.choice(['', '?:'])}{pattern(draw, depth - 1)}|{pattern(draw, depth - 1)})"
    if kind < 0.95:
        times = draw.choice(["*", "+", "?", "{1,2}", "{2}", "*?", "{,2}"])
        return f"(?:{pattern(draw, depth - 1)}){times}"
    return draw.choice("^$") + pattern(draw, depth - 1)


def test_they_match_as_pythons_own_do():
    draw = random.Random(0)
    for _ in range(3000):
        text = pattern(draw, 4)
        name = "".join(draw.choice("ab.1x") for _ in range(draw.randint(0, 7)))
        assert matches_end(text, name) == (re.match(rf"(.*\.)?({text})$", name) is not None), (text, name)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|a)(a|a)" * 90,
        "(.*)*" * 100 + "b",
        "((((a*){1000}){1000}){1000}){1000}b",
        "(?:a?b?){900}" * 50,
    ],
)
def test_a_bomb_matches_as_fast_as_any(text):
    assert not matches_end(text, "model." + "ab" * 100 + "!")


@pytest.mark.parametrize(
    "text",
    [
        *("(", "a{99999999999}", "(" * 3000 + ")" * 3000, "(?=a)", r"(a)\1", "a" * 1001, "(?i)a", r"\bq_proj", "a++"),
        *(r"\x61", r"\u0061", r"\U00000061", r"\N{DIGIT ONE}"),
    ],
)
def test_what_is_not_read_is_refused(text):
    with pytest.raises(SpectuneError, match=r"pattern|regular expression"):
        matches_end(text, "model.a")

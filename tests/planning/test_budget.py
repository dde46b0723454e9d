"""Sizes as people write them, and the largest rank or width within a budget."""

import pytest

import spectune
from spectune import SVF, SVFT, AdaLoRA, DoRA, LoRA, LoRAXS, PiSSA, SpectuneError
from spectune.pages.units import parse_bytes, parse_count
from spectune.planning.budget import least_of, within_budget

SHAPES = [(12, 9), (9, 12), (10, 10), (10, 10)]


def count(method):
    return sum(method.fit(*shape).parameter_count(*shape) for shape in SHAPES)


@pytest.mark.parametrize(
    ("text", "value"), [("100k", 100_000), ("1.5M", 1_500_000), ("2e6", 2_000_000), ("7b", 7 * 10**9), (12, 12)]
)
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GB", 24 * 10**9), ("16GiB", 16 * 2**30), ("512 MB", 512 * 10**6), ("80g", 80 * 10**9), ("100b", 100)],
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "many", "-3k", "0", "1..2M", "3 apples", "nan"])
def test_malformed_sizes_are_told(text):
    with pytest.raises(SpectuneError, match=r"budget: .* is not a number of parameters"):
        parse_count(text)
    with pytest.raises(SpectuneError, match=r"memory: .* is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "method",
    [LoRA(), PiSSA(), LoRAXS(), AdaLoRA(), spectune.VeRA(), DoRA(), DoRA(PiSSA()), SVFT(pattern="banded")],
    ids=lambda m: m.basis_key,
)
@pytest.mark.parametrize("budget", [150, 400, 900, 10**6])
def test_the_next_size_would_not_fit(method, budget):
    found = within_budget(method, SHAPES, budget)
    if found is None:
        assert count(least_of(method)) > budget
        return
    inner = getattr(found, "inner", found)
    field = "width" if isinstance(inner, SVFT) else "rank"
    larger = type(inner)(**{**inner.__dict__, field: getattr(inner, field) + 1})
    larger = DoRA(larger) if found is not inner else larger
    assert count(found) <= budget
    nothing_gained = field == "rank" and getattr(inner, field) == max(map(min, SHAPES))
    assert nothing_gained or count(larger) > budget or (field == "width" and count(larger) == count(found))


def test_a_method_without_a_size_keeps_the_budget_or_does_not():
    assert within_budget(SVF(), SHAPES, 38) == SVF()
    assert within_budget(SVF(), SHAPES, 37) is None


def test_a_plan_says_what_meets_a_budget():
    rows = spectune.plan("minilm-l6", ["lora", "svf"], budget="100k", precisions=["fp32"], measured=False).rows
    assert rows[0]["budget"]["trainable_parameters"] <= 100_000
    assert rows[1]["budget"] == {"method": "svf", "trainable_parameters": rows[1]["trainable_parameters"]}


def test_a_budget_that_nothing_keeps_is_told():
    with pytest.raises(SpectuneError, match=r"as few as 10 parameters on minilm-l6: the least is [0-9,]+ by lora"):
        spectune.plan("minilm-l6", ["lora"], budget=10, precisions=["fp32"], measured=False)

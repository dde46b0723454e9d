"""The verdicts on the article's claims, from reports made up for it."""

import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, str(STUDY))
    try:
        import claims as module
    finally:
        sys.path.remove(str(STUDY))
    return module


def measured(values):
    return {"values": values, "mean": sum(values) / len(values)}


def report(percent=True, greater=True, gap_of="accuracy", **methods):
    rows = [
        {"method": name, "ran": True, "seeds": seeds, "metric": measured(values), "gap": measured(gaps)}
        | {"trainable_parameters": count}
        for name, (seeds, values, gaps, count) in methods.items()
    ]
    return {"methods": rows, "percent": percent, "greater_is_better": greater, "gap_of": gap_of, "model": "tiny"}


def of(values, gaps=(0.0, 0.0, 0.0), count=100, seeds=(0, 1, 2)):
    return list(seeds), list(values), list(gaps), count


def test_a_difference_beyond_chance_decides(claims):
    sure = report(a=of([0.9, 0.91, 0.93]), b=of([0.5, 0.51, 0.52]))
    assert claims.versus({"task": sure}, "a", "b") == ("supported", "task +40 points (+39 to +42)*")
    assert claims.versus({"task": sure}, "b", "a")[0] == "refuted"
    loss = report(percent=False, greater=False, a=of([0.9, 0.91, 0.93]), b=of([0.5, 0.51, 0.52]))
    assert claims.versus({"task": loss}, "a", "b")[0] == "refuted"
    both = {"one": sure, "two": report(a=of([0.1, 0.11, 0.13]), b=of([0.5, 0.51, 0.52]))}
    assert claims.versus(both, "a", "b")[0] == "undecided"
    assert claims.versus({"task": report(a=of([0.9, 0.1, 0.5]), b=of([0.5, 0.5, 0.4]))}, "a", "b")[0] == "undecided"


def test_runs_are_paired_by_seed(claims):
    found = report(a=of([0.9, 0.5], seeds=(2, 0), gaps=(0.0, 0.0)), b=of([0.4, 0.7, 0.8]))
    _, said = claims.versus({"task": found}, "a", "b")
    assert said.startswith("task +10 points")  # 0.9 - 0.8 and 0.5 - 0.4
    assert claims.versus({"task": report(a=of([0.9], [0.0], seeds=(5,)), b=of([0.4, 0.7, 0.8]))}, "a", "b")[1] == ""


def test_who_overfits_is_a_matter_of_the_gap(claims):
    more, less = of([0.5] * 3, [0.30, 0.31, 0.33]), of([0.5] * 3, [0.10, 0.11, 0.12])
    assert claims.versus({"task": report(a=more, b=less)}, "a", "b", "gap")[0] == "supported"
    losses = report(gap_of="loss", a=less, b=more)  # the loss on training data is the lower, the more
    assert claims.versus({"task": losses}, "a", "b", "gap")[0] == "supported"
    assert "points" not in claims.versus({"task": losses}, "a", "b", "gap")[1]


def test_how_many_times_fewer(claims):
    found = {"task": report(a=of([0.5] * 3, count=100), b=of([0.5] * 3, count=700))}
    assert claims.fewer(found, "a", "b", 10) == ("supported", "7x on tiny, at rank 16")
    assert claims.fewer(found, "b", "a", 10)[0] == "refuted"
    assert claims.fewer(found, "a", "c", 10) == ("undecided", "not run")


def test_every_claim_has_one_of_three_verdicts(claims):
    for _, verdict, numbers in claims.claims(claims.reports()):
        assert verdict in ("supported", "refuted", "undecided")
        assert numbers

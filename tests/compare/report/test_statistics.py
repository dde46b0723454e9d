"""Intervals and tests, against scipy, against simulation, and against what they must obey."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spectune.compare.report.statistics import (
    Difference,
    Interval,
    crossed_difference,
    crossed_interval,
    holm,
    mean_interval,
    paired_difference,
    record_difference,
)
from spectune.errors import SpectuneError

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=2, max_size=9).filter(lambda xs: len(set(xs)) > 1))
def test_the_interval_is_students(values):
    found = mean_interval(values, 0.9)
    low, high = stats.t.interval(0.9, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found == pytest.approx((np.mean(values), low, high), rel=1e-9, abs=1e-9)


def test_the_interval_by_hand():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6
    )


def test_one_run_or_equal_runs_have_no_interval():
    assert mean_interval([0.7]) == Interval(0.7)
    assert mean_interval([0.1 + 0.2, 0.3, 0.3]) == Interval(pytest.approx(0.3))
    assert paired_difference([0.7], [0.6]) == Difference(pytest.approx(0.1))
    assert paired_difference([0.7, 0.8, 0.9], [0.6, 0.7, 0.8]) == Difference(pytest.approx(0.1))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [low <= 5 <= high for _, low, high in map(mean_interval, rng.normal(5, 2, (2000, 3)).tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)  # three standard errors


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9))
def test_the_paired_difference_is_the_paired_t_test(pairs):
    ours, theirs = np.array(pairs).T
    found = paired_difference(ours.tolist(), theirs.tolist())
    if np.ptp(ours - theirs) < 1e-9:
        assert found.p is None
        return
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert found == pytest.approx(((ours - theirs).mean(), low, high, expected.pvalue), rel=1e-6, abs=1e-9)
    back = paired_difference(theirs.tolist(), ours.tolist())
    assert (back.mean, back.low, back.high, back.p) == pytest.approx((-found.mean, -found.high, -found.low, found.p))


def test_chance_alone_is_called_significant_as_often_as_it_may():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0, 1, (2, 2000, 3)).tolist()
    p = [paired_difference(a, b).p for a, b in zip(ours, theirs, strict=True)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_a_bootstrap_over_records_agrees_with_one_that_draws_records():
    rng = np.random.default_rng(2)
    ours, theirs = (rng.random((2, 300)) < [[0.85], [0.8]]).astype(float)
    found = record_difference(ours, theirs)
    draws = rng.integers(0, 300, (20_000, 300))
    means = (ours - theirs)[draws].mean(1)
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.004)
    assert found.p == pytest.approx(2 * min((means <= 1e-12).mean(), (means >= -1e-12).mean()), abs=0.01)
    assert record_difference(ours, theirs) == found  # seeded


def test_a_bootstrap_over_records_covers():
    rng = np.random.default_rng(3)
    held = []
    for _ in range(400):
        low, high = record_difference(*(rng.random((2, 400)) < [[0.8], [0.7]]), draws=1000)[1:3]
        held.append(low <= 0.1 <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.035)


def drawn(rng, seeds, records, of_seeds, of_records):
    """Return a table around 0, of what a seed adds, what a record adds, and a rest of 1."""
    seed, record = of_seeds * rng.standard_normal((seeds, 1)), of_records * rng.standard_normal(records)
    return seed + record + rng.standard_normal((seeds, records))


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_records"), [(3, 0.0, 0.0), (3, 0.0, 1.0), (3, 0.1, 0.7), (3, 1.0, 0.5), (5, 0.2, 0.5)]
)
def test_the_interval_over_seeds_and_records_holds_the_truth_as_often_as_it_says(seeds, of_seeds, of_records):
    rng = np.random.default_rng(4)
    held = [low <= 0 <= high for _, low, high in (
        crossed_interval(drawn(rng, seeds, 100, of_seeds, of_records)) for _ in range(400)
    )]  # fmt: skip
    assert 0.92 <= np.mean(held) <= 0.98  # 0.93 to 0.97, and a standard error of 0.01


def test_neither_seeds_nor_records_alone_say_what_both_do():
    rng = np.random.default_rng(5)
    table = drawn(rng, 4, 80, 0.0, 0.8)
    found = crossed_difference(table, np.zeros_like(table))
    over_seeds = mean_interval(table.mean(1).tolist())
    assert found.high - found.low > 1.2 * (over_seeds.high - over_seeds.low)
    back = crossed_difference(np.zeros_like(table), table)
    assert (back.mean, back.low, back.high, back.p) == pytest.approx((-found.mean, -found.high, -found.low, found.p))
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    reaching = crossed_difference(table, np.zeros_like(table), 1 - found.p)  # the interval of that level just reaches 0
    assert min(abs(reaching.low), abs(reaching.high)) == pytest.approx(0, abs=1e-6)


def test_equal_seeds_leave_what_records_say():
    rng = np.random.default_rng(6)
    row = (rng.random(400) < 0.3).astype(float)
    found = crossed_interval([row, row, row])
    half = stats.t.ppf(0.975, 399) * stats.sem(row)
    assert (found.low, found.high) == pytest.approx((row.mean() - half, row.mean() + half), rel=1e-9)
    assert crossed_difference([row, row], [row, row]) == Difference(0.0)
    assert crossed_interval([row]) == Interval(row.mean())


def test_equal_answers_differ_by_nothing():
    assert record_difference([1, 0, 1], [1, 0, 1]) == Difference(0.0, 0.0, 0.0, 1.0)


def test_holm_by_hand():
    # 4 x 0.01, 3 x 0.013, 2 x 0.03, 1 x 0.04 and never less than the one before
    assert holm([0.03, 0.01, 0.04, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p):
    corrected = holm(p)
    assert all(a - 1e-15 <= b <= min(1, len(p) * a) + 1e-15 for a, b in zip(p, corrected, strict=True))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()
    # Holm rejects at 0.05 exactly what stepping down by hand rejects
    rejected, ordered = 0, sorted(p)
    while rejected < len(p) and (len(p) - rejected) * ordered[rejected] < 0.05:
        rejected += 1
    assert sum(c < 0.05 for c in corrected) == rejected


def test_without_scipy_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SpectuneError, match=r"scipy: pip install 'spectune\[compare\]'"):
        mean_interval([1.0, 2.0])

"""Each figure of a spectrum against its definition, written out."""

import math

import numpy as np
import pytest

from spectune.spectrum.measures import curve, measure, recommended_ranks

S = np.sort(np.random.RandomState(3).lognormal(0, 1, 60))[::-1]
SHAPE = (90, 60)


def test_share_counts_both_ends():
    assert measure(np.array([2.0, 1.1, 0.5, 0.1, 0.05]), (5, 5)).share == pytest.approx(3 / 5)
    found = measure(S, SHAPE, 0.5, 2.0)
    assert found.share == pytest.approx(sum(0.5 <= s <= 2.0 for s in S) / 60)
    assert (found.count, found.largest, found.smallest) == (60, S[0], S[-1])
    assert found.median == pytest.approx((S[29] + S[30]) / 2)


def test_stable_rank_is_frobenius_over_spectral_norm():
    W = np.random.RandomState(0).randn(20, 12)
    expected = (W**2).sum() / np.linalg.norm(W, 2) ** 2
    assert measure(np.linalg.svd(W, compute_uv=False), W.shape).stable_rank == pytest.approx(expected)


def test_effective_rank_is_the_exponential_of_the_entropy():
    assert measure(np.ones(7), (7, 7)).effective_rank == pytest.approx(7)
    entropy = -sum(s / S.sum() * math.log(s / S.sum()) for s in S)
    assert measure(S, SHAPE).effective_rank == pytest.approx(math.exp(entropy))
    assert measure(np.array([4.0, 0, 0]), (3, 3)).effective_rank == pytest.approx(1)


def test_ranks_hold_their_energy_and_no_fewer_would():
    found = measure(S, SHAPE)
    for rank, part in ((found.rank_90, 0.9), (found.rank_95, 0.95), (found.rank_99, 0.99)):
        assert sum(S[:rank] ** 2) >= part * sum(S**2) > sum(S[: rank - 1] ** 2)
    assert measure(np.array([3.0, 0, 0, 0]), (4, 4)).rank_99 == 1


def test_condition():
    assert measure(S, SHAPE).condition == pytest.approx(S[0] / S[-1])
    assert measure(np.array([1.0, 1e-9]), (2, 2)).condition is None


def test_the_gap_is_the_largest_ratio_in_the_upper_half():
    two_groups = np.concatenate([np.linspace(9, 8, 5), np.linspace(2, 0.001, 15)])
    found = measure(two_groups, (20, 20))
    assert (found.gap, found.gap_after) == (pytest.approx(4), 5)
    assert measure(np.linspace(2, 1, 20), (20, 20)).gap < 1.06


def test_outliers_and_their_energy():
    noise = np.linalg.svd(np.random.RandomState(1).randn(80, 50), compute_uv=False)
    spiked = np.concatenate([[60.0, 40.0], noise[2:]])
    found = measure(spiked, (80, 50))
    assert found.outliers == 2
    assert found.outlier_energy == pytest.approx(5200 / (spiked**2).sum())
    assert measure(noise, (80, 50)).outlier_energy == 0.0
    assert measure(np.ones(3), (3, 3)).outliers is None


def test_zero_has_figures_too():
    found = measure(np.zeros(12), (12, 20))
    assert (found.share, found.stable_rank, found.effective_rank, found.rank_90) == (0, 0, 0, 0)
    assert (found.condition, found.gap, found.outliers) == (None, 1.0, None)


def test_a_curve_keeps_the_ends_and_the_values():
    ranks, values = curve(S, 10)
    assert (ranks[0], ranks[-1]) == (1, 60)
    assert values == [S[rank - 1] for rank in ranks]


def test_ranks_are_in_proportion_and_cost_what_the_mean_rank_costs():
    shapes = [(100, 100), (300, 100), (100, 50)]
    measured = [measure(S, SHAPE).model_copy(update={"outliers": n}) for n in (10, 20, 40)]
    ranks = recommended_ranks(measured, shapes, mean=8, low=1, high=1000)
    sizes = [sum(shape) for shape in shapes]
    assert sum(r * s for r, s in zip(ranks, sizes, strict=True)) == pytest.approx(8 * sum(sizes), rel=0.1)
    assert ranks[1] == pytest.approx(2 * ranks[0], abs=1)
    assert recommended_ranks(measured, shapes, 8, 6, 9) == [6, 8, 9]
    assert recommended_ranks([m.model_copy(update={"outliers": 0}) for m in measured], shapes) == [4, 4, 4]
    assert recommended_ranks([measured[0].model_copy(update={"outliers": None})], [(4, 4)], 16) == [2]

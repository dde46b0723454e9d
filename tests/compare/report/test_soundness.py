"""What bears no verdict, and the width of the good rates, by hand."""

import pytest

from spectune.compare.report.soundness import fell_apart, uncounted, width


def test_seeds_that_fell_apart():
    values = {0: 0.81, 1: 0.78, 2: 0.38, 3: 0.75, 4: 0.18}
    assert fell_apart(values, 0.24, 0.87, greater=True) == [2, 4]
    assert fell_apart(values, None, 0.87, greater=True) == []
    assert fell_apart({0: 0.27, 1: 0.22}, 0.25, 0.245, greater=True) == []  # nothing was learned
    assert fell_apart({0: 0.70, 1: 0.62}, 0.61, 0.79, greater=True) == []  # learns little, but not at two levels
    assert fell_apart({0: 0.80, 1: 0.70}, 0.61, 0.79, greater=True) == [1]
    assert fell_apart({0: 0.80, 1: 0.70}, 0.61, 0.79, greater=True, records=250) == []  # which may be chance
    assert fell_apart({0: 3.4, 1: 3.5, 2: 4.6}, 4.8, 3.45, greater=False) == [2]


@pytest.mark.parametrize(
    ("best", "start", "why"),
    [(0.06, 0.0, "floor"), (0.28, 0.24, "floor"), (0.98, 0.5, "ceiling"), (0.85, 0.24, None), (0.85, None, None)],
)
def test_floor_and_ceiling(best, start, why):
    assert uncounted(best, start, 0.035, greater=True, share=True) == why
    assert uncounted(best, start, None, greater=True, share=True) is None


def test_a_loss_has_a_floor_and_no_ceiling():
    assert uncounted(4.79, 4.8, 0.02, greater=False, share=False) == "floor"
    assert uncounted(0.99, 4.8, 0.02, greater=False, share=False) is None


def test_the_width_of_the_good_rates():
    tried = [(1e-3, 0.80), (2e-3, 0.84), (4e-3, 0.85), (8e-3, 0.65)]
    found = width(tried, 0.24, greater=True, share=True)
    assert found.octaves == pytest.approx(1 + 0.05)  # 0.84 an octave below, and a twentieth of the way down above
    assert not found.open
    assert width(tried[:3], 0.24, greater=True, share=True).open
    assert width(tried[:1], 0.24, greater=True, share=True) is None
    twice = [*tried, (4e-3, 0.87), (2e-3, 0.88)]  # means of 0.86 and 0.86
    assert width(twice, 0.24, greater=True, share=True).octaves > 1
    losses = [(rate, 4.0 - value) for rate, value in tried]
    assert width(losses, 3.85, greater=False, share=False).octaves < 1  # within a hundredth of 0.7

"""What a comparison can tell, against simulation and by hand."""

import numpy as np
import pytest
from scipy import stats

from spectune.compare.power import Spread, detectable, records_for, seeds_for, spread, told
from spectune.compare.report.statistics import crossed_difference


def test_by_hand():
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert detectable(Spread(0.0, 0.1), 5, 250) == pytest.approx(z * (0.1 / 250) ** 0.5)
    t = stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4)
    assert detectable(Spread(0.01**2, None), 5, 250) == pytest.approx(t * 0.01 * (2 / 5) ** 0.5)
    assert detectable(Spread(0.0, 0.1), 1, 250) == detectable(Spread(0.5, 0.1), 1, 250)


def test_seeds_and_records_that_are_needed_are_the_fewest():
    found = Spread(0.012**2, 0.06)
    seeds = seeds_for(found, 0.04, 800)
    assert detectable(found, seeds, 800) <= 0.04 < detectable(found, seeds - 1, 800)
    records = records_for(found, 0.06, 5)
    assert detectable(found, 5, records) <= 0.06 < detectable(found, 5, round(0.9 * records))
    assert seeds_for(Spread(0.0, 0.1), 0.01, 250) is None
    assert records_for(Spread(0.1, 0.1), 0.01, 5) is None
    assert records_for(Spread(0.1, None), 0.01, 5) is None


def drawn(rng, seeds, records, shift):
    """Return two methods' answers, of which the second is right more often by `shift`."""
    hard = rng.random(records)  # the same for both
    rows = [[(hard < 0.8 + gain + 0.01 * rng.standard_normal()) ^ (rng.random(records) < 0.03) for _ in range(seeds)]
            for gain in (0, shift)]  # fmt: skip
    return np.array(rows, float)


def test_a_difference_that_can_be_told_is_found_about_so_often():
    rng = np.random.default_rng(0)
    pilot = drawn(rng, 5, 400, 0)[0]
    able = detectable(spread(pilot.mean(1), pilot), 5, 400)
    found = [crossed_difference(*drawn(rng, 5, 400, able / 0.94)[::-1]).p < 0.05 for _ in range(80)]
    assert np.mean(found) > 0.65  # what two methods disagree in is guessed from one, on the safe side


def test_the_spread_of_runs():
    right = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]]
    found = spread([0.5, 0.25, 0.75], right)
    assert found.unlike == pytest.approx((1 + 1 + 2) / 3 / 4)
    assert found.of_seeds == pytest.approx(0.0625 - found.unlike / 2 / 4)
    assert spread([0.5, 0.7]).unlike is None
    assert spread([0.5, 0.5], [[1, 0], [1, 0]]) == Spread(0.0, 0.5)  # no fewer than one record


def test_the_sentence():
    assert told(Spread(0.0, 0.1), 3, 5000, 0.02, percent=True) == (
        "3 seeds and 5,000 test records tell a difference of 1.3 points, if two methods disagree on one record in ten"
    )
    said = told(Spread(0.01**2, 0.03), 3, 250, 0.035, percent=True, pilot="LoRA")
    assert said.startswith("3 seeds and 250 test records tell a difference of ")
    assert "by the runs of LoRA; 3.5 points need 8 seeds" in said
    assert told(Spread(0.01**2, None), 3, 250, 0.02, percent=False, pilot="LoRA").endswith("0.02 needs 7 seeds")

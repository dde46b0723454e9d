"""A race of rates, on surfaces that are drawn: what it chooses, what it spends, and what it must not do."""

import sys
from pathlib import Path

import numpy as np
import pytest

from spectune.compare.race import Look, Race, Run, Seen

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))
try:
    from drawn import FLOOR, run, surface
finally:
    sys.path.remove(str(STUDY))


def raced(race, runs):
    """Return what a race has seen when it is over."""
    seen = {}
    while wanted := race.next(seen):
        assert not set(wanted) & set(seen)
        found = {}
        for key in wanted:
            looks = runs[key].looks
            cut = next((i for i in range(2, len(looks)) if race.stops(seen, key, looks[:i])), None)
            found[key] = runs[key] if cut is None else Run(looks[:cut])
        seen |= found
    return seen


def test_regret_and_cost_on_drawn_surfaces():
    rng, race = np.random.default_rng(0), Race(low=-5, high=6, warmup=0.05)
    lost, costs = [], []
    for _ in range(60):
        runs, true = surface(rng)
        seen = raced(race, runs)
        lost.append(100 * (max(true.values()) - true[race.best(seen)]))
        costs.append(race.cost(seen))
    assert np.median(lost) <= 0.5
    assert np.quantile(lost, 0.9) <= 3
    assert max(costs) <= 8.75  # a quarter of seven rates at five seeds


def test_a_rate_that_was_measured_stays_unless_another_is_better_beyond_chance():
    rng = np.random.default_rng(3)
    lost = {True: [], False: []}
    for _ in range(60):
        runs, true = surface(rng)
        # as few records as tell rates apart by chance alone: runs of one rate are off by more than the rates
        noisy = {key: run(one.value + rng.normal(0, 0.12), rng=rng) for key, one in runs.items()}
        best = max(true, key=lambda place: true[place])
        moved = {(place - best, seed): one for (place, seed), one in noisy.items()}
        for measured in (True, False):
            race = Race(low=-5 - best, high=6 - best, measured=measured)
            chosen = race.best(raced(race, moved))
            lost[measured].append(100 * (true[best] - true[best + chosen]))
    assert np.mean(lost[True]) < np.mean(lost[False])
    assert np.median(lost[True]) == 0


def test_a_rate_that_was_measured_is_left_where_it_falls_apart_or_fails():
    values = {-2: 0.7, -1: 0.8, 0: 0.3, 1: 0.3, 2: 0.3}
    seen = {(p, s): run(v) for p, v in values.items() for s in range(2)}
    assert Race(measured=True).best(seen) == -1
    assert Race(measured=True).best(seen | {(0, s): Run() for s in range(2)}) == -1
    assert Race(measured=True).best({(0, 0): run(0.3)}) == 0
    assert Race(measured=True).best({(0, 0): Run(), (-1, 0): run(0.8), (-1, 1): run(0.8)}) == -1


def test_most_runs_go_to_the_closest_rates():
    values = {-2: 0.6, -1: 0.79, 0: 0.82, 1: 0.815, 2: 0.5, 3: 0.3}
    rng = np.random.default_rng(1)
    runs = {(p, s): run(v + rng.normal(0, 0.01), rng=rng) for p, v in values.items() for s in range(5)}
    race = Race(low=-2, high=3)
    seen = raced(race, runs)
    counts = {place: sum(key[0] == place for key in seen) for place in values}
    assert race.best(seen) in (0, 1)
    assert min(counts[0], counts[1]) >= 2 > max(counts[-2], counts[2])


def test_ranges_widen_until_the_best_is_inside():
    runs = {(p, s): run(0.85 - 0.02 * (p - 6) ** 2 if p < 8 else 0.2) for p in range(-10, 11) for s in range(5)}
    race = Race(runs=12)
    seen = raced(race, runs)
    assert race.best(seen) == 6
    assert any(place > 6 for place, _ in seen)


def test_where_nothing_learns_the_search_goes_outwards_on_both_sides():
    runs = {(p, s): run(0.8 if p in (5, 6) else FLOOR) for p in range(-10, 11) for s in range(5)}
    race = Race(runs=14)
    assert race.best(raced(race, runs)) in (5, 6)
    nothing = {key: run(FLOOR) for key in runs}
    assert race.cost(raced(race, nothing)) <= 14


def test_a_rate_at_which_one_seed_in_three_falls_apart_is_not_the_best():
    seen = {(p, s): run(0.80) for p in (0, 1) for s in range(3)} | {(2, s): run(0.86) for s in (0, 1)}
    assert Race().best(seen) == 2
    assert Race().best(seen | {(2, 2): run(0.3)}) != 2
    assert Race().best(seen | {(2, 2): Run()}) != 2  # failed
    assert Seen({(0, 0): run(0.8), (0, 1): run(0.2), (0, 2): run(0.79)}).unstable(0)


def test_no_run_is_stopped_in_the_first_half_in_warm_up_or_while_nothing_has_moved():
    fast, slow = run(0.85, (0.9, 0.95, 1.0)), run(0.85, (0.0, 0.0, 0.0))
    race, seen = Race(), {(0, 0): fast}
    assert not race.stops(seen, (1, 0), slow.looks[:2])  # a quarter
    assert race.stops(seen, (1, 0), slow.looks[:3])  # half, far behind
    assert not Race(warmup=0.6).stops(seen, (1, 0), slow.looks[:3])
    assert not race.stops(
        {(0, 0): run(0.85, (0.0, 0.1, 0.5))}, (1, 0), slow.looks[:3]
    )  # the other has not moved either
    assert not race.stops({(0, 1): fast}, (1, 0), slow.looks[:3])  # of another seed
    assert not race.stops(seen, (1, 0), run(0.8, (0.8, 0.8, 0.9)).looks[:3])  # close


def test_the_next_runs_do_not_depend_on_the_order_in_which_others_ended():
    runs, _ = surface(np.random.default_rng(3))
    race = Race(low=-5, high=6)
    seen = raced(race, runs)
    backwards = dict(reversed(seen.items()))
    assert race.best(backwards) == race.best(seen)
    some = dict(list(seen.items())[:5])
    assert race.next(dict(reversed(some.items()))) == race.next(some)


def test_a_rate_is_judged_by_its_neighbours_too():
    seen = {(p, 0): run(v) for p, v in {-2: 0.70, -1: 0.76, 0: 0.80, 1: 0.79, 2: 0.74}.items()}
    mean, covariance = Seen(seen).posterior([-2, -1, 0, 1, 2, 8])
    assert mean[2] == pytest.approx(0.80, abs=0.02)
    assert np.argmax(mean[:5]) in (2, 3)
    assert covariance[5, 5] > 3 * covariance[2, 2]


def test_failures_alone_have_no_best_rate():
    assert Race().best({(0, 0): Run(), (2, 0): Run()}) is None
    assert Race().best({}) is None
    race = Race(runs=4)
    seen = raced(race, {(p, s): Run() for p in range(-10, 11) for s in range(5)})
    assert race.best(seen) is None


def test_losses_race_too():
    losses = {-2: -3.6, -1: -3.5, 0: -3.42, 1: -3.40, 2: -3.5, 3: -4.2}
    rng = np.random.default_rng(4)
    runs = {}
    for place, value in losses.items():
        for seed in range(5):
            values = [-4.8, *np.linspace(-4.6, value + rng.normal(0, 0.01), 4)]
            runs[place, seed] = Run(tuple(Look(10 * i, v) for i, v in enumerate(values)), ended=True)
    race = Race(low=-2, high=3)
    assert race.best(raced(race, runs)) in (0, 1)

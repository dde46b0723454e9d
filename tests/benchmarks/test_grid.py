"""The grid of the study and what is judged on it, on surfaces that are drawn; nothing trains here."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from spectune.compare.race import Look, Run
from spectune.methods import METHODS

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    try:
        before = dict(METHODS)
        found = {
            name: importlib.import_module(name)
            for name in ("drawn", "grid", "regret", "auto", "control", "sensitivity", "at_best")
        }
    finally:
        sys.path.remove(str(STUDY))
    assert before == METHODS  # a control is nobody else's method
    return found


def lines_of(study, plan, method, rng):
    """Return a grid as a file has it."""
    runs, true = study["drawn"].surface(rng)
    lines = []
    for place in plan.places:
        for seed in range(plan.seeds):
            looks = runs[place, seed].looks
            lines.append({
                "method": method, "place": place, "lr": 10.0 ** (place / 4), "seed": seed, "error": None,
                "looks": [[look.step, look.value, "".join(map(str, look.right))] for look in looks],
                "losses": [1 - look.value for look in looks], "test": {"accuracy": true[place]},
            })  # fmt: skip
    return lines, true


def test_a_grid_goes_on_where_it_stopped(study, tmp_path):
    grid = study["grid"]
    plan = grid.Plan("none", {}, ["lora", "svf"], range(-1, 2), 2)
    path = tmp_path / "grid.jsonl"
    assert grid.lines(path) == []
    done = [{"method": "lora", "place": place, "seed": seed} for place in (0, 1) for seed in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in done) + '{"method": "lora", "pla')
    assert grid.lines(path) == done
    left = list(grid.missing(plan, plan.methods, grid.lines(path)))
    assert left[:2] == [("lora", -1, 0), ("lora", -1, 1)]
    assert len(left) == 8


def test_regret_is_counted_on_whole_grids_and_the_race_is_nearer_than_halving(study):
    grid, regret = study["grid"], study["regret"]
    plan, rng = grid.PLANS["question-types"], np.random.default_rng(0)
    lines, truths = [], {}
    for method in plan.methods:
        own, truths[method] = lines_of(study, plan, method, rng)
        lines += own
    grids = regret.surfaces(plan, lines[:-1])
    assert list(grids) == plan.methods[:-1]
    assert grids["svf"].truth == pytest.approx({place: truths["svf"][place] for place in plan.places})
    rows = {name: [row for s in grids.values() for row in regret.regrets(s, search)]
            for name, search in regret.SEARCHES.items()}  # fmt: skip
    told = {name: regret.told(found) for name, found in rows.items()}
    assert told["the race"]["searches"] == 50
    assert told["the race"]["most"] <= 0.25
    assert told["the race"]["median"] <= 0.5
    assert told["the race"]["q95"] < told["successive halving (before)"]["q95"]


def test_halving_drops_the_worse_half_and_goes_on_where_an_end_is_best(study):
    regret = study["regret"]
    values = {-4: 0.5, -2: 0.6, 0: 0.7, 2: 0.8, 4: 0.75}
    runs = {(p, 0): Run(tuple(Look(i, v) for i in range(5)), ended=True) for p, v in values.items()}
    losses = {(p, 0): [1.0, *[1 - v] * 4] for p, v in values.items()}
    place, cost = regret.halving(regret.Surface(runs, losses, values, 1))
    assert place == 2
    assert cost == pytest.approx(1 + 1 / 4 + 1 + 1 / 2)  # 0 and 2 to their ends; -2 and 4 to the first and second rung


def test_the_table_has_whole_grids_with_their_best_rate_and_where_seeds_fell_apart(study, monkeypatch, tmp_path):
    sensitivity, plan = study["sensitivity"], study["grid"].PLANS["question-types"]
    own, truth = lines_of(study, plan, "svf", np.random.default_rng(0))
    best = max(truth, key=truth.get)
    own[0]["test"] = {"accuracy": 0.0}  # a seed that fell apart at the lowest place
    path = tmp_path / "question-types.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*own, *own[:3]]))
    monkeypatch.setattr(sensitivity, "GRID", tmp_path)
    head, _, row = sensitivity.table("question-types", plan).split("\n")[2:]
    assert head.count("|") == row.count("|") == len(plan.places) + 5
    assert row.split("|")[1].strip() == "`svf`"
    assert f"**{100 * truth[best]:.1f}**" in row
    low = row.split("|")[3 + sorted(plan.places).index(own[0]["place"])]
    assert low.strip().endswith("*")
    path.write_text(json.dumps(own[0]) + "\n")
    assert sensitivity.table("question-types", plan) == ""


def test_a_rate_between_two_of_the_grid_is_judged_by_both(study):
    surface = study["regret"].Surface({}, {}, {0: 0.6, 1: 0.8}, 1)
    truth_at = study["auto"].truth_at
    assert truth_at(surface, {0: 0.01, 1: 1.0}, 0.1) == pytest.approx(0.7)
    assert truth_at(surface, {0: 0.01, 1: 1.0}, 30.0) == pytest.approx(0.8)


def test_the_control_has_the_magnitude_of_pissa_and_other_directions(study):
    import torch

    from spectune.methods.pissa import PiSSA
    from spectune.spectral import SVD

    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    decomposition = SVD(*(part[..., :4] if part.ndim < 2 or i == 0 else part[:4]
                          for i, part in enumerate(torch.linalg.svd(weight, full_matrices=False))))  # fmt: skip
    ours = study["control"].MatchedLoRA(rank=4).basis(weight, decomposition)
    theirs = PiSSA(rank=4).basis(weight, decomposition)
    products = [basis["B0"] @ basis["A0"] for basis in (ours, theirs)]
    sizes = [torch.linalg.svdvals(product)[:4] for product in products]
    assert torch.allclose(*sizes, atol=1e-4)
    assert (products[0] * products[1]).sum() < 0.5 * products[0].square().sum()


def test_methods_are_compared_where_their_validation_is_best(study):
    at_best, Surface = study["at_best"], study["regret"].Surface

    def surface(tests, looked, each_seed):
        runs = {(place, seed): Run((Look(0, 0.2), Look(8, value)), ended=True)
                for place, value in looked.items() for seed in range(3)}  # fmt: skip
        each = {(place, seed): value + each_seed * (seed - 1) for place, value in tests.items() for seed in range(3)}
        return Surface(runs, {}, tests, 3, each)

    # the test is better at the other rate, which nobody who searches can know
    lora = surface({0: 0.6, 1: 0.9}, {0: 0.7, 1: 0.5}, 0.01)
    svf = surface({0: 0.5, 1: 0.8}, {0: 0.4, 1: 0.6}, 0.02)
    assert at_best.best_place(lora) == 0
    rows = at_best.compared({"lora:rank=16": lora, "svf": svf}, percent=True)
    # differences of 19, 20 and 21 points: t of 4.303 times 1 / sqrt(3)
    assert rows == [["`svf`", "`lora:rank=16`", "80.0", "60.0", "+20 (+18 to +22)", "better"]]
    for low, high, said in (
        (-0.3, -0.1, "worse"), (-0.01, 0.01, "the same, within the margin"), (-0.03, 0.01, "open")
    ):  # fmt: skip
        assert at_best.verdict(low, high) == said

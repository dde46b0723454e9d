"""A learning rate that is measured."""

import json
import math

import pytest

from cli.typed import run
from spectune.errors import SpectuneError
from spectune.training.rate import STEPS, Tried, choose, next_place, run_again
from training.folder import WORDS, save_folder


def searched(loss):
    """Return the places that a search tries, in order, given the loss at each."""
    tried: list = []
    while (place := next_place(tried)) is not None:
        assert place not in dict(tried)
        tried.append((place, loss(place)))
    return [place for place, _ in tried]


def test_rates_are_tried_uphill_and_the_best_has_both_beside_it():
    assert searched(lambda p: (p - 3) ** 2) == [0, 2, 4, 3]
    assert searched(lambda p: (p + 2) ** 2) == [0, 2, -2, -4, -1, -3]
    assert searched(lambda p: p**2) == [0, 2, -2, 1, -1]
    assert searched(lambda p: -p) == [0, 2, 4, 6, 5]  # no further than the ladder
    assert searched(lambda p: math.nan if p > -3 else 1.0) == [0, 2, -2, -4, -3]
    assert searched(lambda p: math.inf if p > 1 else -p) == [0, 2, -2, 1]


def test_a_run_takes_less_than_the_best_of_short_ones():
    curve = [Tried(1e-3, 2.0), Tried(1e-2, 1.0), Tried(1e-1, math.inf)]
    assert choose(3.0, curve)[0] == choose(3.0, curve, 32)[0] == choose(3.0, curve, 8)[0] == pytest.approx(5.6e-3)
    rate, reason = choose(3.0, curve, 3200)
    assert rate == pytest.approx(5.6e-4)
    assert reason.endswith("a run of 3,200 wants less")


def test_the_best_and_those_beside_it_run_again():
    assert run_again({0: 3.0, 2: 1.0, 4: 2.0, 3: 1.5, 1: math.inf}) == [2, 3]
    assert run_again({0: math.nan}) == []
    lucky, mean, other = Tried(1e-3, 0.9), Tried(1e-2, 1.0, 2), Tried(1e-1, 1.1, 2)
    assert choose(3.0, [lucky, mean, other])[0] == pytest.approx(5.6e-3)


def test_no_rate_that_helps_is_told():
    with pytest.raises(SpectuneError, match="no learning rate from"):
        choose(1.0, [Tried(1e-3, 1.1), Tried(1e-2, math.nan)])


def test_a_run_measures_its_rate_and_says_it(tmp_path):
    model, data = save_folder(tmp_path / "model"), tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {WORDS[i % 10]}", "completion": f"ahoy {WORDS[i % 10]}"} for i in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = [f"model={model}", f"data={data}", f"output={tmp_path / 'out'}", "method=lora:rank=4"]
    settings += ["dtype=fp32", "device=cpu", "max_steps=2", "--json"]
    found = json.loads(run("lr", *settings).stdout)
    assert found["steps"] == STEPS * sum(each["runs"] for each in found["tried"])
    assert 4 <= len(found["tried"]) <= 8
    twice = [i for i, each in enumerate(found["tried"]) if each["runs"] == 2]
    assert 2 <= len(twice) <= 3
    assert twice == list(range(twice[0], twice[-1] + 1))
    assert json.loads(run("lr", *settings).stdout) == found
    told = run("train", *settings, "lr=auto").stderr
    assert f"lr {found['rate']:.2g}: of {len(found['tried'])} rates" in " ".join(told.split())
    assert f"lr: {found['rate']}" in (tmp_path / "out" / "config.yaml").read_text()


def test_adalora_is_measured_without_a_word_on_its_length(tmp_path):
    model, data = save_folder(tmp_path / "model"), tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {WORDS[i % 10]}", "completion": f"ahoy {WORDS[i % 10]}"} for i in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = [f"model={model}", f"data={data}", f"output={tmp_path / 'out'}", "method=adalora:rank=2", "--json"]
    assert json.loads(run("lr", *settings, "device=cpu", "dtype=fp32").stdout)["rate"] > 0

"""Looks at a run while it trains: what was right, when it has levelled, where it ends."""

import math

import pytest

from compare.tiny_bench import config
from spectune.compare.bench import Bench
from spectune.compare.looks import levelled
from spectune.compare.trial import Trial


def test_every_look_says_what_was_answered_right(folder, tmp_path):
    result = Bench(config(folder, tmp_path, max_steps=7)).run(Trial("lora", 1e-2, 0, "search"))
    assert [look["step"] for look in result["looks"]] == [0, 2, 4, 6, 7]
    for look in result["looks"]:
        assert look["value"] == pytest.approx(look["right"].count("1") / len(look["right"]))
    assert result["validation"]["accuracy"] == result["looks"][-1]["value"]


def test_a_run_ends_where_it_is_told_to_or_where_its_loss_levels(folder, tmp_path):
    bench = Bench(config(folder, tmp_path, metric="loss"))
    dropped = bench.run(Trial("lora", 1e-2, 0, "search"), lambda looks: looks[-1].step == 4)
    assert (dropped["steps"], dropped["pruned"]) == (4, True)
    assert dropped["looks"][-1]["value"] == -dropped["validation"]["loss"]
    assert bench.run(Trial("lora", 1e-2, 0, "time"))["validation"] is None
    level = Bench(config(folder, tmp_path, until="plateau", max_steps=160, metric="loss"))
    result = level.run(Trial("lora", 3e-2, 0, "search"))
    assert not result["pruned"]
    assert 40 < result["steps"] < 160
    assert result["steps"] % 20 == 0


def test_when_a_loss_has_levelled():
    assert levelled([2.0, 1.0, 0.5, 0.5, 0.499], 2)
    assert not levelled([2.0, 1.0, 0.5, 0.4, 0.3], 2)  # it falls
    assert not levelled([2.0, 2.0, 2.0, 2.0, 2.0], 2)  # it has not moved yet
    assert not levelled([2.0, 1.0, 1.0], 2)  # the first quarter
    assert not levelled([2.0, 1.0, 1.0, math.nan], 2)

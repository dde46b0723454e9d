"""A learning rate that is measured."""

import json
import math

import pytest

from cli.test_commands import run
from spectune.errors import SpectuneError
from spectune.training.rate import Tried, choose
from training.folder import WORDS, save_folder


def test_the_rate_is_below_the_least_of_a_parabola():
    curve = [Tried(r, (math.log10(r) + 2) ** 2) for r in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    assert choose(10.0, curve)[0] == pytest.approx(5e-3)
    skewed = [Tried(r, (math.log10(r) + 1.7) ** 2) for r in (1e-3, 1e-2, 1e-1)]
    assert choose(10.0, skewed)[0] == pytest.approx(1e-2, rel=0.01)
    assert choose(3.0, [Tried(1e-3, 2.0), Tried(1e-2, 1.0), Tried(1e-1, math.inf)])[0] == pytest.approx(5e-3)


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
    assert found["steps"] <= 60
    assert len(found["tried"]) == 5
    assert json.loads(run("lr", *settings).stdout) == found
    told = run("train", *settings, "lr=auto").stderr
    assert f"lr {found['rate']:.2g}: of 5 rates" in " ".join(told.split())
    assert f"lr: {found['rate']}" in (tmp_path / "out" / "config.yaml").read_text()

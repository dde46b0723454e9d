"""What the document says of results: numbers against a computation by hand, and the verdict in every case."""

import json
import math
import shlex

import numpy as np
import pytest

from compare.comparison import HEADER, METHODS, final, results, whole
from spectune.cli.train import file_and_pairs
from spectune.compare.report.document import document
from spectune.compare.report.statistics import crossed_difference, crossed_interval
from spectune.training.config import load_config


def made(finals, searches=(), **header):
    return document({**HEADER, **header}, finals, list(searches)).model_dump()


def verdict(methods, seeds=range(3), spread=0.0, **header):
    """Return the document of runs with these mean accuracies, off by `spread` at two of three seeds."""
    finals = []
    for i, (method, accuracy) in enumerate(methods.items()):
        for seed in seeds:
            run = final(method, seed, np.random.default_rng(5), accuracy)
            off = spread * ((-1, 0, 1), (0, 1, -1), (1, -1, 0))[i % 3][seed]
            run |= {"test": {"loss": 1 - accuracy, "accuracy": accuracy + off}, "right": None}
            finals.append(run)
    return made(finals, **header)


def at(found, method):
    return next(row for row in found["methods"] if row["method"] == method)


@pytest.fixture(scope="module")
def found():
    return document(*whole()).model_dump()


def test_numbers_by_hand(found):
    _, finals, searches = whole()
    runs = [r for r in finals if r["method"] == "pissa"]
    base = [r for r in finals if r["method"] == "lora"]
    row, values = at(found, "pissa"), [r["test"]["accuracy"] for r in runs]
    assert (row["seeds"], row["lr"], row["trainable_parameters"]) == ([0, 1, 2], 3.2e-4, 663_552)
    assert row["metric"]["values"] == values
    assert row["metric"]["mean"] == pytest.approx(np.mean(values))
    tables = [[run["right"] for run in rs] for rs in (runs, base)]
    assert (row["metric"]["over"], row["difference"]["over"]) == ("both", "both")
    assert row["metric"]["high"] == pytest.approx(crossed_interval(tables[0]).high)
    assert row["difference"]["p"] == pytest.approx(crossed_difference(*tables).p)
    assert row["gap"]["mean"] == pytest.approx(0.06)
    assert row["forgetting"]["mean"] == pytest.approx(0.05 + 663_552 / 3e8)
    assert row["step_over_floor"] == pytest.approx(0.151 / 0.11)
    assert row["cost_seconds"] == pytest.approx(3 * (2.4 + 120 * 0.151) + 5 * 9.3)
    assert row["curves"]["eval_loss"][-1] == [
        120,
        pytest.approx(np.mean([r["history"][-1]["eval_loss"] for r in runs])),
    ]
    assert found["seconds"] == pytest.approx(sum(row["cost_seconds"] for row in found["methods"]))
    assert len(found["trials"]) == len(finals) + len(searches)
    means = [row["metric"]["mean"] for row in found["methods"] if row["ran"]]
    assert means == sorted(means, reverse=True)


def test_every_difference_is_corrected_for_all(found):
    tested = [row["difference"] for row in found["methods"] if row["difference"]]
    assert found["tested"] == len(tested) == len(METHODS) - 1
    least = min(tested, key=lambda d: d["p"])
    assert least["corrected_p"] == pytest.approx(11 * least["p"])
    assert all(d["beyond_chance"] == (d["corrected_p"] < 0.05) for d in tested)


def test_failures_are_shown(found):
    assert [(f["kind"], f["method"]) for f in found["failures"]] == [("final", "vera"), ("search", "pissa")]
    assert not at(found, "vera")["ran"]
    assert any("VeRA failed in every run" in sentence for sentence in found["answer"])
    assert at(found, "pissa")["search"][-1]["error"]


def test_the_edge_of_the_learning_rates(found):
    assert {row["method"]: row["edge"] for row in found["methods"] if row["edge"]} == {"svf": "highest"}


def test_it_is_json_whatever_was_not_finite():
    finals, searches = results(methods=("lora", "svf"))
    finals[0]["test"]["accuracy"] = math.nan
    finals[1]["history"][0]["loss"] = math.inf
    found = made(finals, searches)
    json.dumps(found, allow_nan=False)
    assert found["failures"] == [
        {"kind": "final", "method": "lora", "lr": 1e-3, "seed": 0, "error": "it has no finite accuracy on the test"}
    ]
    assert at(found, "lora")["seeds"] == [1, 2]
    assert at(found, "svf")["difference"]["seeds"] == 2  # paired where both ran


def begun(finals, start):
    """Return results whose model had some accuracy before the first step."""
    return [{**r, "history": [{"step": 0, "eval_accuracy": start, "eval_loss": 1.0}, *r["history"]]} for r in finals]


def test_a_method_that_fell_apart_is_told_and_counts_for_nothing():
    finals, _ = results(methods=("lora", "svf", "pissa"), seeds=range(5), lora=0.80, svf=0.60, pissa=0.86)
    for run in finals:
        if run["method"] == "pissa" and run["seed"] in (2, 4):
            run |= {"right": [1] * 80 + [0] * 320, "test": {"accuracy": 0.2, "loss": 1.5}}
    found = made(begun(finals, 0.2))
    assert at(found, "pissa")["fell_apart"] == [2, 4]
    assert at(found, "pissa")["difference"]["beyond_chance"] is None
    assert any("PiSSA fell apart in 2 of 5 runs (20.0% at seed 2, 20.0% at seed 4)" in s for s in found["answer"])
    assert found["tested"] == 1
    assert found["recommended"] == "lora"


def test_a_task_that_nothing_learned_or_that_all_have_learned_counts_for_nothing():
    low, high = (results(methods=("lora", "svf"), **dict.fromkeys(("lora", "svf"), share))[0] for share in (0.06, 0.99))
    found = made(begun(low, 0.05))
    assert (found["uncounted"], found["recommended"]) == ("floor", None)
    assert found["answer"][0].startswith("No method learned this task to speak of: the best, ")
    found = made(begun(high, 0.05))
    assert found["uncounted"] == "ceiling"
    assert found["answer"][0].startswith("This task is at its ceiling")
    assert made(begun(results(methods=("lora", "svf"))[0], 0.25))["uncounted"] is None


def test_the_width_of_the_good_rates_is_a_result(found):
    assert at(found, "lora")["sensitivity"]["octaves"] > 0
    assert at(found, "base")["sensitivity"] is None
    assert at(found, "svf")["sensitivity"]["open"]  # the highest is its best


def test_every_run_can_be_taken_away(found):
    finals = [run for run in found["trials"] if run["kind"] == "final" and not run["error"]]
    assert all(run["right"].count("1") / len(run["right"]) == pytest.approx(run["test"]) for run in finals)


def test_where_less_is_better():
    finals, searches = results(methods=("lora", "svf"), svf=0.93)
    found = made(finals, searches, metric="loss", greater_is_better=False)
    assert found["methods"][0]["method"] == "svf"
    assert at(found, "svf")["difference"]["mean"] < 0
    assert found["answer"][0].startswith("SVF is ahead of LoRA by 0.0")
    assert (found["percent"], at(found, "svf")["over_records"]) == (False, None)  # right answers are not the loss


def test_replies_are_searched_by_loss():
    finals, searches = results(methods=("lora", "svf"))
    for run in [*finals, *searches]:
        run["validation"] = {"loss": run["validation"]["loss"]}
    for run in finals:
        run["test"]["exact_match"] = run["test"]["accuracy"]
    found = made(finals, searches, metric="exact_match", task="sft")
    assert (found["searched_by"], found["gap_of"], found["percent"]) == ("loss", "loss", True)


def test_the_command_trains_what_was_compared(found):
    words = shlex.split(at(found, "dora:inner=pissa")["train_command"])
    assert words[:2] == ["spectune", "train"]
    config = load_config(*file_and_pairs(words[2:]))
    assert (config.method, config.lr, config.max_steps, config.seed) == ("dora:inner=pissa", 3.2e-4, 120, 0)
    assert (config.task, config.batch_size, config.max_length) == ("classify", 16, 64)
    assert config.targets == ["query", "value"]
    assert at(found, "full")["train_command"] is None


def test_names_that_would_be_the_same_are_told_apart():
    found = verdict({"svft:width=8": 0.8, "svft:pattern=8": 0.8, "lora:rank=4": 0.8, "full": 0.8})
    assert {row["label"] for row in found["methods"]} == {
        "svft:width=8", "svft:pattern=8", "LoRA rank=4", "full fine-tuning"
    }  # fmt: skip

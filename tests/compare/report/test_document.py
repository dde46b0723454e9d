"""What the document says of results: numbers against a computation by hand, and the verdict in every case."""

import json
import math
import shlex

import numpy as np
import pytest

from compare.comparison import HEADER, METHODS, failed, final, results, whole
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


def test_one_ahead():
    found = verdict({"lora": 0.80, "pissa": 0.85, "svf": 0.845}, spread=0.001)
    assert found["answer"][0].startswith("PiSSA is ahead of LoRA by 5.0 points (95% interval ")
    assert "corrected p " in found["answer"][0]
    assert found["answer"][0].endswith("; so is SVF.")
    assert found["recommended"] == "pissa"


def test_none_ahead_and_the_cheapest():
    found = verdict({"lora": 0.850, "pissa": 0.851, "svf": 0.849}, spread=0.02)
    assert found["answer"][0] == "No method differs from LoRA beyond chance at 3 seeds."
    assert found["answer"][1].startswith("The cheapest within the interval of the best (")
    assert "is SVF: 84" in found["answer"][1]
    assert "with 13.8k trained parameters, 48 times fewer." in found["answer"][1]
    assert found["recommended"] == "svf"
    assert "could not have been told from chance" in found["answer"][2]


def test_some_behind():
    found = verdict({"lora": 0.85, "svf": 0.80, "pissa": 0.8505}, spread=0.002)
    assert found["answer"][0] == "No method is ahead of LoRA beyond chance at 3 seeds; SVF is behind it."


def test_the_baseline_ahead_of_all():
    found = verdict({"lora": 0.85, "svf": 0.80, "pissa": 0.81}, spread=0.001)
    assert found["answer"][0] == "LoRA is ahead of every other method beyond chance at 3 seeds."


def test_one_method():
    found = verdict({"lora": 0.85}, spread=0.001)
    assert found["answer"][0].startswith("LoRA reached a test accuracy 85.")
    assert "nothing to compare it with" in found["answer"][0]


def test_the_base_is_best():
    found = verdict({"lora": 0.85, "base": 0.88, "svf": 0.86}, spread=0.004)
    assert any(s.startswith("No method improves on the model without an adapter") for s in found["answer"])
    assert (found["uncounted"], found["recommended"]) == ("floor", None)
    assert at(found, "base")["train_command"] is None


def test_a_new_head_alone_is_no_winner():
    finals, _ = results(methods=("lora", "svf", "base"), lora=0.85, svf=0.85, base=0.85)
    for run in finals:
        run["trainable_parameters"] += 770
        run["history"] = []  # what the head had before it was trained is not known
    found = made(finals)
    assert found["recommended"] == "svf"
    assert "The model without an adapter (base) is no further from the best." in found["answer"] or (
        "No method improves on the model without an adapter (base), which has the best mean." in found["answer"]
    )


def test_full_fine_tuning_ahead_has_no_command():
    found = verdict({"lora": 0.80, "full": 0.85}, spread=0.001)
    assert found["answer"][0].startswith("Full fine-tuning is ahead of LoRA by 5.0 points")
    assert (found["recommended"], found["train_command"]) == ("full", None)


def test_all_failed():
    found = made([failed("lora"), failed("svf")], [failed("svf", "search")])
    assert found["answer"][0].startswith("No method ran to its end, so there is nothing to compare: the loss is not")
    assert found["best"] is found["recommended"] is found["train_command"] is None


@pytest.mark.parametrize(
    ("baseline", "more", "why"),
    [
        (None, [], "none was compared"),
        ("dora", [], "dora is not among them"),
        ("dora", [failed("dora")], "dora failed"),
    ],
)
def test_no_baseline(baseline, more, why):
    finals, _ = results(methods=("lora", "svf"))
    found = made([*finals, *more], baseline=baseline)
    assert f"there is no baseline to test it against ({why})." in found["answer"][0]
    assert all(row["difference"] is None for row in found["methods"])


def test_methods_without_a_seed_in_common_are_named():
    finals, _ = results(methods=("lora", "svf", "pissa"), seeds=(0, 1, 2))
    kept = [r for r in finals if r["method"] == "pissa" or (r["seed"] == 0) == (r["method"] == "svf")]
    found = made(kept)
    assert at(found, "svf")["difference"] is None
    assert "SVF and LoRA ran at no seed together, so that nothing says how they differ." in found["answer"]


def test_one_seed_is_judged_over_records():
    finals, _ = results(seeds=(0,), methods=("lora", "svf", "base"))
    found = made(finals)
    row = at(found, "base")
    assert (row["metric"]["low"], row["difference"]["over"]) == (None, "records")
    assert row["difference"]["beyond_chance"]
    assert found["answer"][0].startswith("No method is ahead of LoRA beyond chance on these records; base is behind")
    assert any(s.startswith("With one seed there is no interval over seeds; differences are") for s in found["answer"])


def test_one_seed_and_no_records_says_so():
    found = verdict({"lora": 0.85, "svf": 0.86}, seeds=[0])
    assert found["answer"][0].startswith("SVF has the highest test accuracy 86.0% (one seed), but with 1 seed nothing")
    assert found["answer"][-1].endswith("nothing says how sure a number is.")


def test_a_lead_over_seeds_that_other_records_may_not_bear_out_is_none():
    finals = []
    for method, rights in (("lora", (300, 301, 300)), ("pissa", (304, 305, 305))):
        for seed, count in enumerate(rights):
            run = final(method, seed, np.random.default_rng(0), 0.75)
            right = [1] * count + [0] * (400 - count)
            if method == "pissa":  # right elsewhere
                right = right[::-1]
            finals.append({**run, "right": right, "test": {"accuracy": count / 400, "loss": 0.5}})
    found = made(finals)
    assert found["answer"][0] == "No method differs from LoRA beyond chance at 3 seeds."
    assert at(found, "pissa")["difference"]["over"] == "both"
    alone = made([{**run, "right": None} for run in finals])  # nobody knows which records
    assert at(alone, "pissa")["difference"]["over"] == "seeds"
    assert alone["answer"][0].startswith("PiSSA is ahead of LoRA by 1.1 points")


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

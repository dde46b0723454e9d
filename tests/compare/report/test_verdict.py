"""The verdict in every case."""

import numpy as np
import pytest

from compare.comparison import failed, final, results
from compare.report.test_document import at, made, verdict


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

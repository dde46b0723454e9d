"""Trials of a comparison on a tiny model: what each kind of run measures, and what its data are."""

import json

import pytest
import torch

from compare.tiny_bench import CLASSES, config
from spectune import SpectuneError
from spectune.compare.bench import Bench
from spectune.compare.candidates import candidates
from spectune.compare.trial import Trial
from training.folder import NUMBERS


def test_a_trial_of_every_kind_leaves_the_base_as_it_was(folder, tmp_path):
    bench = Bench(config(folder, tmp_path))
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    for method in ("base", "full", "lora", "dora:inner=svf"):
        lr = None if method == "base" else 1e-2
        result = bench.run(Trial(method, lr, 0, "final"))
        assert result["error"] is None
        assert result["steps"] == 8
        assert len(result["right"]) == len(bench.parts.test)
        assert sum(result["right"]) / len(result["right"]) == pytest.approx(result["test"]["accuracy"])
        assert result["general"]["name"] == "drift of hidden states"
        assert (result["general"]["after"] < 1e-6) == (method == "base")
        after = bench.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    head = 32 * CLASSES + CLASSES
    assert bench.run(Trial("base", None, 0, "final"))["trainable_parameters"] == head


def test_where_a_search_begins_is_measured_and_leaves_the_base_as_it_was(folder, tmp_path):
    bench = Bench(config(folder, tmp_path, start="auto"))
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    found = [bench.run(Trial("svf", None, 7, "start")) for _ in range(2)]
    assert found[0]["start"] == found[1]["start"] > 0
    assert found[0]["steps"] % 24 == 0
    after = bench.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())


def test_the_same_trial_gives_the_same_result(folder, tmp_path):
    results = [Bench(config(folder, tmp_path)).run(Trial("lora", 1e-2, 3, "final")) for _ in range(2)]
    for key in ("test", "validation", "train", "right", "general"):
        assert results[0][key] == results[1][key]


def test_numbers_and_lists_of_labels_are_compared_by_their_own_measures(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    values = {"data": str(tmp_path / "data.jsonl"), "max_steps": 2}
    for label, problem, metric in (
        (lambda few: [1.5, 0.25][few], "regression", "pearson"),
        (lambda few: [["many"], ["few", "less"]][few], "multi_label_classification", "micro_f1"),
    ):
        told = [{**row, "label": label(row["label"] == "few")} for row in rows]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, told)))
        with pytest.raises(SpectuneError, match=f"for problem_type={problem}, which has no accuracy: give"):
            Bench(config(folder, tmp_path, **values))
        bench = Bench(config(folder, tmp_path, **values, problem_type=problem))
        assert bench.config.measure == metric
        result = bench.run(Trial("lora", 1e-2, 0, "final"))
        assert metric in result["test"]
        assert result["right"] is None


def test_what_cannot_be_compared(folder, tmp_path):
    for key, value in {"lr": 1e-3, "method": "lora", "held_out": 0.1, "resume": True}.items():
        with pytest.raises(SpectuneError, match=f"{key} is not a key of compare"):
            config(folder, tmp_path, **{key: value})
    with pytest.raises(SpectuneError, match="metric: exact_match does not fit task: classify"):
        config(folder, tmp_path, metric="exact_match")
    with pytest.raises(SpectuneError, match="leave nothing to train on"):
        config(folder, tmp_path, validation=0.5, test=0.5)
    with pytest.raises(SpectuneError, match="and until: plateau lets its loss say: give one"):
        config(folder, tmp_path, until="plateau", equal="time")
    chosen = config(folder, tmp_path, methods=["lora", "lora:rank=8"])
    with pytest.raises(SpectuneError, match="is there twice"):
        candidates(chosen, Bench(chosen).model)


def test_preferences_are_measured_against_the_base_where_every_weight_trains(folder, tmp_path):
    rows = [{"prompt": f"say {w}", "chosen": " hello", "rejected": " ahoy"} for w in NUMBERS for _ in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"task": "dpo", "model": str(folder / "decoder"), "data": str(path), "methods": ["full"], "general": None}
    result = Bench(config(folder, tmp_path, **values)).run(Trial("full", 1e-2, 0, "final"))
    assert result["test"]["reward_accuracy"] == 1.0
    assert result["test"]["loss"] < 0.6


def test_every_trial_keeps_the_same_activations(folder, tmp_path, monkeypatch):
    bench = Bench(config(folder, tmp_path))
    trained, seen, floors = bench._trained, [], []

    def checkpoints(model):
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def look(trial, config, model, *rest):
        seen.append(checkpoints(model))
        return trained(trial, config, model, *rest)

    monkeypatch.setattr(bench, "_trained", look)
    monkeypatch.setattr("spectune.compare.bench.floor", lambda model, *rest: floors.append(checkpoints(model)) or 1.0)
    for method in ("full", "base", "lora", "full", "base"):
        bench.run(Trial(method, None if method == "base" else 1e-3, 0, "final"))
        assert not checkpoints(bench.model)
    assert seen == [True] * 5
    assert floors == [False] * 3  # of base and lora; full has none

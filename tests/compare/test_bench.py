"""Trials of a comparison on a tiny model: what each kind of run measures, and what its data are."""

import gc
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from compare.tiny_bench import CLASSES, config, write_data, write_encoder
from spectune import SpectuneError
from spectune.bases.generation import Reply
from spectune.compare.answers import exact_matches
from spectune.compare.bench import Bench
from spectune.compare.candidates import baseline, candidates
from spectune.compare.looks import levelled
from spectune.compare.meter import Peak, StepTimes
from spectune.compare.parts import Parts
from spectune.compare.trial import Trial
from training.folder import NUMBERS, make_model, make_tokenizer, save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    write_encoder(path / "encoder")
    save_folder(path / "decoder")
    write_data(path / "data.jsonl")
    return path


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


def test_the_same_trial_gives_the_same_result(folder, tmp_path):
    results = [Bench(config(folder, tmp_path)).run(Trial("lora", 1e-2, 3, "final")) for _ in range(2)]
    for key in ("test", "validation", "train", "right", "general"):
        assert results[0][key] == results[1][key]


def test_folds_and_the_test_share_no_record_and_take_turns(folder, tmp_path):
    parts = Bench(config(folder, tmp_path, validation=0.2)).parts
    assert len(parts.folds) == 4
    texts = [record["text"] for part in (parts.test, *parts.folds) for record in part]
    assert len(texts) == len(set(texts))
    assert [len(part) for part in parts.records.values()] == [72, 18, 30]
    held = [{str(e["input_ids"]) for e in parts.fold(seed).validation} for seed in range(8)]
    assert held[:4] == held[4:]
    assert len(set.union(*held)) == sum(map(len, held[:4]))
    for seed, own in enumerate(held):
        learned = {str(e["input_ids"]) for e in parts.fold(seed).train}
        assert not learned & own
        assert len(learned) + len(own) == 90


def test_parts_have_their_share_of_every_label_and_no_copy_is_in_two(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rare = [row for row in rows if row["label"] == "few"][:30]
    often = [row for row in rows if row["label"] == "many"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*rare, *rare, *often, *often])))
    parts = Parts(config(folder, tmp_path, data=str(tmp_path / "data.jsonl"))).records
    counts = {name: Counter(record["label"] for record in part) for name, part in parts.items()}
    assert all(abs(count["few"] / count.total() - 1 / 3) < 0.07 for count in counts.values())
    texts = [{record["text"] for record in part} for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 90


def test_a_test_that_says_nothing_is_refused_before_anything_is_loaded(folder, tmp_path):
    values = {"model": "nowhere"}
    with pytest.raises(SpectuneError, match="test has 12 records, and says nothing below 20"):
        Bench(config(folder, tmp_path, **values, test=0.1))
    with pytest.raises(SpectuneError, match="validation has 3 records"):
        Bench(config(folder, tmp_path, **values, validation=0.03))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["label"] == "few"))
    with pytest.raises(SpectuneError, match="60 test records has the answer 'few', so that accuracy tells no method"):
        Bench(config(folder, tmp_path, **values, test_data=str(tmp_path / "test.jsonl")))


def test_a_difference_to_detect_takes_a_larger_test(folder, tmp_path):
    parts = Parts(config(folder, tmp_path, detect=12))
    assert len(parts.test) == 55
    assert any(note.startswith("test=0.46, for detect=12") for note in parts.notes)
    assert len(Parts(config(folder, tmp_path, detect=2)).test) == 60
    assert len(Parts(config(folder, tmp_path, detect=2, test=0.3)).test) == 36


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


def test_a_language_model_is_judged_by_exact_matches(folder, tmp_path):
    pairs = [f"{a} and {b}" for a in NUMBERS[3:9] for b in NUMBERS[3:8]]
    rows = [{"prompt": f"say {n} {w}", "completion": " " + w} for w in ("one", "two", "three") for n in pairs]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"task": "sft", "model": str(folder / "decoder"), "data": str(path), "metric": "exact_match"}
    bench = Bench(config(folder, tmp_path, **values, max_steps=60))
    result = bench.run(Trial("lora", 2e-2, 0, "final"))
    assert result["general"]["name"] == "loss on general text"
    assert result["general"]["before"] != result["general"]["after"]
    assert result["test"]["exact_match"] == 1.0
    base = bench.run(Trial("base", None, 0, "final"))
    assert base["test"]["exact_match"] < 1.0
    assert bench.run(Trial("base", None, 1, "final")) is base  # nothing trains, so that seeds make no difference


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


def test_a_budget_sets_ranks(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["lora", "svf"], budget="4k")
    bench = Bench(chosen)
    methods, notes = candidates(chosen, bench.model)
    assert methods[0].startswith("lora:rank=")
    assert methods[1] == "svf"
    assert bench.run(Trial(methods[0], 1e-2, 0, "search"))["trainable_parameters"] < 4000 + 200
    tight, notes = candidates(config(folder, tmp_path, methods=["svf"], budget="10"), bench.model)
    assert tight == ["svf"]
    assert "cannot be made as small as 10" in notes[0]


def test_preferences_are_measured_against_the_base_where_every_weight_trains(folder, tmp_path):
    rows = [{"prompt": f"say {w}", "chosen": " hello", "rejected": " ahoy"} for w in NUMBERS for _ in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"task": "dpo", "model": str(folder / "decoder"), "data": str(path), "methods": ["full"], "general": None}
    result = Bench(config(folder, tmp_path, **values)).run(Trial("full", 1e-2, 0, "final"))
    assert result["test"]["reward_accuracy"] == 1.0
    assert result["test"]["loss"] < 0.6


def test_the_baseline_is_sized_as_the_methods_are(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["lora:rank=16", "svf"], baseline="lora:rank=16", budget="4k")
    model = Bench(chosen).model
    methods, _ = candidates(chosen, model)
    assert methods[0] not in ("lora", "lora:rank=16")
    assert baseline(chosen, methods, model) == methods[0]
    other = config(folder, tmp_path, methods=["svf"], baseline="lora:rank=16")
    with pytest.raises(SpectuneError, match=r"baseline: lora:rank=16 is not among what is compared \(svf\)"):
        baseline(other, ["svf"], model)
    assert baseline(config(folder, tmp_path, methods=["svf"]), ["svf"], model) is None


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


def test_a_step_is_measured_until_the_device_has_done_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in (torch.device("cpu"), torch.device("cuda")):
        times = StepTimes()
        times.on_step_begin(SimpleNamespace(device=device), None, None)
        times.on_step_end(SimpleNamespace(device=device), None, None)
        assert len(times.seconds) == 1
    assert waited == [torch.device("cuda")] * 2


def test_exact_matches_need_completions_before_anything_is_loaded(folder, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": "one two"}) for _ in range(90)))
    values = {"task": "sft", "model": "nowhere", "data": str(path), "metric": "exact_match"}
    with pytest.raises(SpectuneError, match="metric: exact_match needs records with messages"):
        Bench(config(folder, tmp_path, **values))


def test_records_of_both_forms_are_asked_each_in_its_own(monkeypatch):
    def echo(model, tokenizer, prompts, *, raw, **settings):
        assert all(isinstance(prompt, str) == raw for prompt in prompts)
        return [Reply(prompt if raw else prompt[-1]["content"], []) for prompt in prompts]

    monkeypatch.setattr("spectune.compare.answers.generate", echo)
    records, right = [], []
    for i in range(80):
        question, answer = f"say {i}", "ahoy" if i % 3 else f"say {i}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"messages": turns} if i % 2 else {"prompt": question, "completion": f" {answer}"})
        right.append(int(answer == question))
    assert exact_matches(make_model(), make_tokenizer(), records) == right


def test_the_peak_leaves_out_what_the_trial_before_held():
    before: list = [torch.ones(2**24)]
    before.append(before)
    del before
    peak = Peak()
    gc.collect()
    held = torch.ones(2**24)
    assert peak.bytes() is None or peak.bytes() > 0.8 * held.nbytes

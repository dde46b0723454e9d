"""The trials of a comparison: their order, their results, and what a kill leaves."""

import gc
import json
import multiprocessing
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from compare.tiny_bench import CLASSES, config, write_data, write_encoder
from spectune import SpectuneError
from spectune.bases.generation import Reply
from spectune.compare.bench import Bench, exact_matches
from spectune.compare.candidates import baseline, candidates, further, grid
from spectune.compare.config import CompareConfig, check_folder, digest
from spectune.compare.meter import Peak, StepTimes
from spectune.compare.study import Study, best_lr, work
from spectune.compare.trial import Results, Trial
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
        assert len(result["right"]) == len(bench.records["test"])
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


def test_parts_share_no_record(folder, tmp_path):
    bench = Bench(config(folder, tmp_path))
    texts = [record["text"] for part in bench.records.values() for record in part]
    assert len(texts) == len(set(texts)) == 120


def test_parts_have_their_share_of_every_label_and_no_copy_is_in_two(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rare = [row for row in rows if row["label"] == "few"][:20]
    often = [row for row in rows if row["label"] == "many"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*rare, *rare, *often, *often])))
    bench = Bench(config(folder, tmp_path, data=str(tmp_path / "data.jsonl")))
    counts = {name: Counter(record["label"] for record in part) for name, part in bench.records.items()}
    assert all(abs(count["few"] / count.total() - 0.25) < 0.06 for count in counts.values())
    texts = [{record["text"] for record in part} for part in bench.records.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 80


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


def test_a_study_ends_and_nothing_runs_twice(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["base", "lora", "svf"], seeds=2, lrs=3)
    bench = Bench(chosen)
    methods, _ = candidates(chosen, bench.model)
    ran = []
    work(
        chosen,
        methods,
        "s",
        bench,
        lambda result: ran.append((result["method"], result["lr"], result["kind"], result["seed"])),
    )
    study = Study(chosen, methods, Results(tmp_path / "trials", "s"))
    assert study.pending() == []
    assert len(ran) == len(set(ran))
    assert sum(kind == "final" for _, _, kind, _ in ran) == 6
    for method in ("lora", "svf"):
        searched = {trial.lr: result for trial, result in study.searches(method)}
        assert {trial.lr for trial, _ in study.finals(method)} == {best_lr(searched, chosen)}
        assert {trial.seed for trial, _ in study.searches(method)}.isdisjoint({0, 1})
    again = []
    work(chosen, methods, "s", bench, again.append)
    assert again == []


def test_seeds_can_be_added(folder, tmp_path):
    chosen = config(folder, tmp_path, seeds=1, lrs=2)
    bench = Bench(chosen)
    work(chosen, ["lora"], "s", bench)
    results = Results(tmp_path / "trials", "s")
    pending = Study(config(folder, tmp_path, seeds=3, lrs=2), ["lora"], results).pending()
    assert [(trial.kind, trial.seed) for trial in pending] == [("final", 1), ("final", 2)]
    assert results.corrupt == []


def test_a_result_of_another_comparison_is_kept_and_refused(tmp_path):
    trial = Trial("base", None, 0, "final")
    Results(tmp_path, "s").put(trial, {"error": None})
    with pytest.raises(SpectuneError, match=r"base\.seed0\.json is of another comparison: give another output"):
        Results(tmp_path, "t").get(trial)
    assert Results(tmp_path, "s").get(trial) is not None


def test_a_corrupt_result_is_named_and_runs_again(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["base"], seeds=1)
    work(chosen, ["base"], "s", Bench(chosen))
    results = Results(tmp_path / "trials", "s")
    [path] = (tmp_path / "trials").glob("*.json")
    path.write_text(path.read_text()[:100])
    assert Study(chosen, ["base"], results).pending() == [Trial("base", None, 0, "final")]
    assert results.corrupt == [path.name]
    work(chosen, ["base"], "s", Bench(chosen))
    assert Study(chosen, ["base"], Results(tmp_path / "trials", "s")).pending() == []


def _hold(folder, ready):
    with Results(folder, "s").claimed(Trial("lora", 0.1, 0, "final")) as mine:
        ready.put(mine)
        ready.get()


def test_a_claim_ends_with_its_worker_however_it_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=600) is True
    results, trial = Results(tmp_path, "s"), Trial("lora", 0.1, 0, "final")
    with results.claimed(trial) as mine:
        assert not mine
    process.kill()
    process.join()
    with results.claimed(trial) as mine:
        assert mine


def test_a_trial_whose_workers_are_killed_again_and_again_is_given_up(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["lora"], seeds=1, lrs=1)
    results = Results(tmp_path / "trials", "s")
    [trial] = Study(chosen, ["lora"], results).pending()
    for _ in range(3):
        assert results.attempt(trial)
    work(chosen, ["lora"], "s", Bench(chosen))
    assert "killed" in results.get(trial)["error"]


def test_an_interrupted_trial_is_no_killed_one(folder, tmp_path, monkeypatch):
    chosen = config(folder, tmp_path, methods=["base"], seeds=1)
    bench = Bench(chosen)

    def interrupt(trial):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "run", interrupt)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                work(chosen, ["base"], "s", bench)
    work(chosen, ["base"], "s", bench)
    assert Results(tmp_path / "trials", "s").get(Trial("base", None, 0, "final"))["error"] is None


def test_learning_rates_go_outwards_from_the_methods_own_and_on_where_the_end_is_best():
    chosen = CompareConfig(model="m", data="d", lrs=5)
    tried = grid(chosen, "lora")
    assert tried[0] == 1e-3
    assert sorted(tried) == [1e-4, 0.00032, 1e-3, 0.0032, 0.01]
    assert grid(chosen, "base") == []
    assert further(chosen, "lora", tried, 1e-3) is None
    assert further(chosen, "lora", tried, 0.01) == 0.032
    assert further(chosen, "lora", [*tried, 0.032, 0.1], 0.1) is None


def test_the_last_learning_rate_that_fell_behind_is_dropped(folder, tmp_path):
    chosen = config(folder, tmp_path, methods=["lora"], lrs=3, metric="accuracy")
    results = Results(tmp_path / "trials", "s")
    study = Study(chosen, ["lora"], results)
    for trial, losses in zip(study.pending(), ([1.0, 0.9], [0.5, 0.4], [2.0, 1.9]), strict=True):
        stop = study.pruner(trial)
        stopped = [stop(rung, {"loss": loss}) for rung, loss in zip((1, 2), losses, strict=True)]
        assert stopped[0] == (losses[0] == 2.0)
        result = {"error": None, "pruned": any(stopped), "validation": {"loss": losses[1]}, **study.reported()}
        results.put(trial, {"lr": trial.lr, **result})


def test_what_cannot_be_compared(folder, tmp_path):
    for key, value in {"lr": 1e-3, "method": "lora", "held_out": 0.1, "resume": True}.items():
        with pytest.raises(SpectuneError, match=f"{key} is not a key of compare"):
            config(folder, tmp_path, **{key: value})
    with pytest.raises(SpectuneError, match="metric: exact_match does not fit task: classify"):
        config(folder, tmp_path, metric="exact_match")
    with pytest.raises(SpectuneError, match="leave nothing to train on"):
        config(folder, tmp_path, validation=0.5, test=0.5)
    with pytest.raises(SpectuneError, match="validation has 3 records"):
        Bench(config(folder, tmp_path, validation=0.03))
    chosen = config(folder, tmp_path, methods=["lora", "lora:rank=8"])
    with pytest.raises(SpectuneError, match="is there twice"):
        candidates(chosen, Bench(chosen).model)


def test_another_comparison_in_the_folder_is_refused(folder, tmp_path):
    chosen = config(folder, tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(chosen.settings()))
    check_folder(config(folder, tmp_path, seeds=7, methods=["svf"]))
    with pytest.raises(SpectuneError, match="max_steps: 8, not 9"):
        check_folder(config(folder, tmp_path, max_steps=9))
    assert digest(chosen.settings()) == digest(config(folder, tmp_path, workers=2).settings())


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

    monkeypatch.setattr("spectune.compare.bench.generate", echo)
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

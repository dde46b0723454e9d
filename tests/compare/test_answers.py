"""Exact matches: what a language model is judged by."""

import json

import pytest

from compare.tiny_bench import config
from spectune import SpectuneError
from spectune.bases.generation import Reply
from spectune.compare.answers import exact_matches
from spectune.compare.bench import Bench
from spectune.compare.trial import Trial
from training.folder import NUMBERS, make_model, make_tokenizer


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

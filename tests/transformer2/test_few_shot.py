"""Mixing weights from a few shots: the objective, its gradient, the search, and the adapter that comes of it."""

import pytest
import torch

import spectune
from spectune import FewShot, SpectuneError
from spectune.transformer2.shots import as_shot, population_likelihood
from transformer2 import cases


def from_mixture(pool, weights, count=6):
    """Return shots whose completions are what a mixture says, so that it, and only it, makes them likely."""
    words = ["one", "two", "three", "four", "five", "six"]
    prompts = [f"say {a} and {b}" for a, b in zip(words, reversed(words), strict=True)][:count]
    pool.activate(weights)
    replies = spectune.bases.generation.generate(pool.model, cases.tokenizer(), prompts, max_new_tokens=5)
    return [{"prompt": p, "completion": r.text} for p, r in zip(prompts, replies, strict=True) if r.text]


@pytest.mark.parametrize("search", ["cem", "gradient"])
def test_the_search_does_better_than_what_it_starts_from(tmp_path, search):

    pool = cases.pool(tmp_path)
    records = from_mixture(pool, {"plus": 1.0})
    wanted = FewShot(records, search=search, population=16, elites=4, iterations=12)
    seen = []
    found = wanted.find(pool, cases.tokenizer(), lambda *state: seen.append(state))
    examples = [as_shot(record, cases.tokenizer()) for record in records]
    uniform = dict.fromkeys(cases.NAMES, 1 / 3)
    at_found, at_uniform, at_right = population_likelihood(pool, [found.mixture(), uniform, {"plus": 1.0}], examples)
    assert found.score == pytest.approx(float(at_found), abs=1e-4)
    assert at_found > at_uniform + 0.1
    if search == "cem":
        assert at_found >= at_right - 1e-4  # each adapter alone was tried
    assert len(seen) == len(found.history)


@pytest.mark.parametrize("by", ["global", "layer", "projection"])
def test_what_was_found_is_an_ordinary_adapter(tmp_path, by):
    pool = cases.pool(tmp_path, ("svf", "lora:rank=2", "lora_xs:rank=4"))
    found = FewShot(cases.SHOTS, by=by, population=6, elites=2, iterations=2).find(pool, cases.tokenizer())
    assert found.kinds == {"global": ("all",), "layer": ("0", "1")}.get(by, found.kinds)
    if by == "projection":
        assert set(found.kinds) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    found.adapter(pool.library).save(tmp_path / "mix")
    with torch.no_grad():
        pool.activate(found.mixture())
        expected = pool.model(cases.ids(2)).logits
    made = cases.logits_of(spectune.Adapter.load(tmp_path / "mix"), cases.ids(2))
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    table = found.summary()["weights"]
    assert set(table) == set(found.kinds)


def test_a_reward_decides_and_likelihood_breaks_ties(tmp_path):
    pool = cases.pool(tmp_path)
    wanted = from_mixture(pool, {"say": 1.0})
    calls = []

    def reward(reply, record):
        calls.append(reply)
        return float(reply == record["completion"])

    found = FewShot(wanted, reward=reward, population=6, elites=2, iterations=2, max_new_tokens=5).find(
        pool, cases.tokenizer()
    )
    assert found.score == 1.0
    anchors = len(pool.library) + 2
    assert len(calls) == (6 * len(found.history) + anchors) * len(wanted)


def test_a_reward_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "graded.py").write_text(
        "def exact(completions, completion, prompts):\n"
        "    assert prompts[0].startswith('say ')\n"
        "    return [float(a == b) for a, b in zip(completions, completion)]\n"
        "def said(completions, messages, prompts):\n"
        "    assert prompts[0][0]['role'] == 'user'\n"
        "    return [float(a[0]['content'] == m[-1]['content']) for a, m in zip(completions, messages)]\n"
        "def needs(completions, level):\n    return level\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = cases.pool(tmp_path)
    wanted = from_mixture(pool, {"say": 1.0})
    options = {"population": 6, "elites": 2, "iterations": 1, "max_new_tokens": 5}
    assert FewShot(wanted, reward="graded:exact", **options).find(pool, cases.tokenizer()).score == 1.0
    turns = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in wanted
    ]
    talks = [{"messages": messages, "prompt": None} for messages in turns]  # as a table has a column without a value
    assert FewShot(talks, reward="graded:said", **options).find(pool, cases.tokenizer()).score == 1.0
    with pytest.raises(SpectuneError, match="takes 'level', which is no column"):
        FewShot(wanted, reward="graded:needs", **options).find(pool, cases.tokenizer())


def test_the_seed_decides(tmp_path):
    pool = cases.pool(tmp_path)
    runs = [
        FewShot(cases.SHOTS, population=6, elites=2, iterations=2, seed=seed).find(pool, cases.tokenizer()).weights
        for seed in (0, 0)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "head"}, "by must be global, layer or projection"),
        ({"search": "grid"}, "search must be cem or gradient"),
        ({"search": "gradient", "reward": lambda *_: 1.0}, "a reward has no gradient"),
        ({"elites": 40}, "elites must be from 1 to population"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"std": 0.0}, "std must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
    ],
)
def test_options_out_of_range_are_told(options, message):
    with pytest.raises(SpectuneError, match=message):
        FewShot(cases.SHOTS, **options)

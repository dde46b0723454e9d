"""Shots: what of them is the reply, and how likely mixtures make it."""

import pytest
import torch
import torch.nn.functional as F

from spectune import FewShot, SpectuneError
from spectune.transformer2.shots import as_shot, population_likelihood
from transformer2 import cases


def likelihood_by_hand(model, shot):
    tokens, supervised = shot.example
    with torch.no_grad():
        log = F.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    values = [float(log[i - 1, tokens[i]]) for i in range(1, len(tokens)) if supervised[i]]
    return sum(values) / len(values)


def test_a_shot_is_its_last_reply():
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    shot = as_shot(record, cases.tokenizer())
    learned = [token for token, on in zip(*shot.example, strict=True) if on]
    assert cases.tokenizer().decode(learned) == "four five </s>"
    assert shot.completion == "four five"
    assert shot.prompt == record["messages"][:-1]


@pytest.mark.parametrize("methods", [("svf",) * 3, ("lora:rank=2", "svf", "dora:rank=2")], ids=["svf", "mixed"])
def test_a_population_in_one_batch_scores_as_each_mixture_alone(tmp_path, methods, monkeypatch):
    pool = cases.pool(tmp_path, methods)
    mixtures = [{"ahoy": 1.0}, {}, {"ahoy": 0.3, "plus": 0.9, "say": 0.1}]
    scores = population_likelihood(pool, mixtures, cases.shots())
    expected = []
    for mixture in mixtures:
        pool.activate(mixture)
        expected.append(sum(likelihood_by_hand(pool.model, shot) for shot in cases.shots()) / 3)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("spectune.transformer2.shots.TOKENS", 40)  # a few shots at a time
    torch.testing.assert_close(population_likelihood(pool, mixtures, cases.shots()), scores, rtol=1e-4, atol=1e-4)


def test_bad_shots_are_told(tmp_path):
    pool, tokenizer = cases.pool(tmp_path), cases.tokenizer()
    with pytest.raises(SpectuneError, match="there are no shots: give a few examples"):
        FewShot([])
    same = [{"prompt": f"say {word}", "completion": "one"} for word in ("two", "three")]
    with pytest.raises(SpectuneError, match=r"all 2 shots have the completion 'one'.* at least two classes"):
        FewShot(same).find(pool, tokenizer)
    for record in ({"prompt": "say"}, {"messages": [{"role": "user", "content": "say"}]}, {"text": "say one"}):
        with pytest.raises(SpectuneError, match="a shot needs a prompt and the completion"):
            FewShot([record]).find(pool, tokenizer)
    with pytest.raises(SpectuneError, match="has no adapter 'ahoi'"):
        FewShot(cases.SHOTS, names=["ahoi"]).find(pool, tokenizer)

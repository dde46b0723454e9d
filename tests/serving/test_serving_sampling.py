"""The next token of a row: what is drawn, subtracted and told."""

from dataclasses import fields

import pytest
import torch

import tiny
from spectune.serving.sampling import Sampler, Sampling

VOCABULARY = 48


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


def logits(seed=0, size=VOCABULARY):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def reply(model, sampling, row=0, steps=12, prompt=(3, 5)):
    sampler, tokens = Sampler(model, sampling, prompt, row), []
    for step in range(steps):
        tokens.append(sampler.choose(logits(step), tokens)[0])
    return tokens


def test_a_row_has_the_number_behind_the_first_ones(model):
    drawn = [reply(model, Sampling(seed=40), row) for row in range(3)]
    assert drawn == [reply(model, Sampling(seed=40 + row)) for row in range(3)]
    assert drawn[0] != drawn[1]
    assert reply(model, Sampling(seed=(1 << 63) - 1), 1) == reply(model, Sampling(seed=0))  # round the end


def test_without_a_temperature_nothing_is_drawn(model):
    likeliest = [int(logits(step).argmax()) for step in range(12)]
    assert reply(model, Sampling(temperature=0)) == likeliest
    assert reply(model, Sampling(temperature=0, top_p=0.5, top_k=3, min_p=0.2)) == likeliest
    assert reply(model, Sampling(top_k=1, seed=1)) == likeliest


CHANGED = {
    "temperature": 0.7,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "bias": {4: 1.0},
    "logprobs": 0,
}


@pytest.mark.parametrize("name", CHANGED)
def test_only_a_row_of_which_nothing_is_asked_takes_the_likeliest_unseen(model, name):
    assert Sampler(model, Sampling(temperature=0), [1]).plain
    assert not Sampler(model, Sampling(**{"temperature": 0, name: CHANGED[name]}), [1]).plain
    others = {field.name for field in fields(Sampling)} - CHANGED.keys()
    assert others == {"top_p", "top_k", "min_p", "seed"}  # which say nothing where nothing is drawn


def test_penalties_count_the_reply_and_not_the_prompt(model):
    sampling = Sampling(temperature=0, presence_penalty=0.75, frequency_penalty=0.5)
    sampler, tokens, flat = Sampler(model, sampling, [7, 7, 7]), [], torch.zeros(VOCABULARY)
    flat[7] = 2.0
    for _ in range(3):
        tokens.append(sampler.choose(flat, tokens)[0])
    assert tokens[:2] == [7, 7]  # 2, then 2 - 0.75 - 0.5
    assert tokens[2] == 7  # 2 - 0.75 - 1.0 = 0.25
    assert sampler.choose(flat, tokens)[0] != 7  # 2 - 0.75 - 1.5 = -0.25, and zeros beside it
    assert float(flat[7]) == 2.0


def test_what_is_told_are_the_models_own_probabilities(model):
    sampling = Sampling(temperature=0, bias={9: 100.0}, logprobs=3)
    scores = logits()
    token, told = Sampler(model, sampling, [1]).choose(scores, [])
    assert token == 9 == told.token
    own = scores.log_softmax(-1)
    assert told.logprob == pytest.approx(float(own[9]))
    assert [i for i, _ in told.likeliest] == own.topk(3).indices.tolist()
    assert Sampler(model, Sampling(temperature=0, logprobs=0), [1]).choose(scores, [])[1].likeliest == []
    assert Sampler(model, Sampling(temperature=0), [1]).choose(scores, [])[1] is None


def test_the_models_own_configuration_is_left_as_it_was(model):
    before = model.generation_config.to_dict()
    Sampler(model, Sampling(temperature=0.3, top_k=2, repetition_penalty=1.5), [1])
    assert model.generation_config.to_dict() == before

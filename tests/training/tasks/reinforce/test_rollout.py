"""Rollouts: completions drawn from the model's own distribution, and logits as if each lay alone."""

import pytest
import torch

import spectune
import spectune.training.tasks.reinforce.rollout as rollout_module
from spectune.speed.attention import packed_attention
from spectune.training.tasks.reinforce.rollout import completion_logits, lay_out, sample, shares_prompts
from tiny import ARCHITECTURES

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
ENDS = list(range(3, 11))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gemma3", "mistral"])
def test_logits_are_those_of_each_completion_alone(architecture):
    model = ARCHITECTURES[architecture]()
    spectune.adapt(model, "svf")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    groups = sample(model, PROMPTS, 4, max_new_tokens=6, temperature=1.0, pad=0, ends=ENDS)
    assert len({len(c) for group in groups for c in group}) > 1
    rollout = lay_out(model, PROMPTS, groups, pad=0)
    alone = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    expected = [model(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in alone]
    torch.testing.assert_close(completion_logits(model, rollout), torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert rollout.tokens.tolist() == [token for _, c in alone for token in c]
    assert rollout.owner.bincount().tolist() == [len(c) for _, c in alone]


def test_a_model_with_windows_or_an_attention_of_its_own_shares_no_prompts():
    llama = ARCHITECTURES["llama"]()
    assert shares_prompts(llama)
    with packed_attention(llama):  # as in a run
        assert shares_prompts(llama)
    assert not shares_prompts(ARCHITECTURES["gemma3"]())
    assert not shares_prompts(ARCHITECTURES["mistral"]())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(temperature):
    model = ARCHITECTURES["llama"]()
    groups = sample(model, [[5, 6], [7, 8, 9]], 2000, max_new_tokens=1, temperature=temperature, pad=0, ends=[])
    for prompt, group in zip([[5, 6], [7, 8, 9]], groups, strict=True):
        p = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature, -1)
        drawn = torch.tensor([c[0] for c in group]).bincount(minlength=len(p)) / len(group)
        assert (drawn - p).abs().sum() < 0.25  # about sqrt(2 * 96 / (pi * 2000)) for 96 equally likely tokens


def test_a_models_own_habits_of_generation_do_not_count():
    model = ARCHITECTURES["llama"]()
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    [group] = sample(model, [[5, 6]], 200, max_new_tokens=1, temperature=1.0, pad=0, ends=[])
    assert len({c[0] for c in group}) > 20
    assert model.generation_config.top_k == 1


def test_greedy_completions_are_the_most_likely_tokens_and_end_where_they_end():
    model = ARCHITECTURES["llama"]().train()
    [[found]] = sample(model, [[5, 6, 7]], 1, max_new_tokens=5, temperature=0.0, pad=0, ends=[])
    assert model.training
    row = [5, 6, 7]
    for token in found:
        assert token == int(model.eval()(input_ids=torch.tensor([row])).logits[0, -1].argmax())
        row.append(token)
    [[cut]] = sample(model, [[5, 6, 7]], 1, max_new_tokens=5, temperature=0.0, pad=0, ends=[found[2]])
    assert cut == found[: found.index(found[2]) + 1]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_end_by_themselves_and_leave_the_others_as_they_are(architecture):
    model = ARCHITECTURES[architecture]()
    whole = sample(model, PROMPTS, 1, max_new_tokens=9, temperature=0.0, pad=0, ends=[])
    assert {len(c) for [c] in whole} == {9}
    ends = [whole[0][0][1], whole[2][0][4]]
    cut = sample(model, PROMPTS, 1, max_new_tokens=9, temperature=0.0, pad=0, ends=ends)
    for [completion], [longer] in zip(cut, whole, strict=True):
        length = next((i + 1 for i, token in enumerate(longer) if token in ends), 9)
        assert completion == longer[:length]


def test_both_ways_of_drawing_are_one_distribution(monkeypatch):
    model = ARCHITECTURES["llama"]()
    counts = []
    for shares in (True, False):
        monkeypatch.setattr(rollout_module, "shares_prompts", lambda _, shares=shares: shares)
        torch.manual_seed(0)
        counts.append(sample(model, PROMPTS, 3, max_new_tokens=4, temperature=1.0, pad=0, ends=[]))
    assert counts[0] == counts[1]  # by the same random numbers


def test_tokens_beyond_the_last_whole_block_are_drawn():
    torch.manual_seed(0)
    logits = torch.full((4000, rollout_module._BLOCK + 3), -20.0)
    logits[:, -2], logits[:, 5] = 1.0, 0.0
    drawn = rollout_module._drawn(logits, 1.0)[:, 0]
    assert set(drawn.tolist()) == {5, rollout_module._BLOCK + 1}
    assert abs((drawn == 5).float().mean() - 1 / (1 + 2.718281828)) < 0.035  # five standard errors

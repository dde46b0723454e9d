"""Replies: batches, limits and sampling."""

import pytest
import torch

from spectune.bases.generation import generate, prompt_tokens
from spectune.errors import SpectuneError
from training.folder import make_model, make_tokenizer


def test_a_batch_of_prompts_of_different_lengths_equals_each_alone():
    model, tokenizer = make_model().eval(), make_tokenizer()
    prompts = ["say", "what is one plus two and three", "hello and ahoy"]
    together = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [generate(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]


def test_sampling_is_seeded():
    model, tokenizer = make_model().eval(), make_tokenizer()
    sampled = [generate(model, tokenizer, ["say"], temperature=2.0, seed=s, max_new_tokens=8) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_reply_never_goes_beyond_the_context():
    model, tokenizer = make_model().eval(), make_tokenizer()
    prompt = "one " * 55
    reply = generate(model, tokenizer, [prompt], max_new_tokens=500)[0]
    assert len(prompt_tokens(tokenizer, prompt)) + len(reply.tokens) <= 64


def test_a_prompt_longer_than_the_context():
    with pytest.raises(SpectuneError, match="the model's context holds 64"):
        generate(make_model(), make_tokenizer(), ["one " * 70])


def test_messages_need_a_template_and_raw_text_does_not():
    tokenizer = make_tokenizer(template=None)
    with pytest.raises(SpectuneError, match="no chat template"):
        prompt_tokens(tokenizer, [{"role": "user", "content": "say"}])
    assert torch.tensor(prompt_tokens(tokenizer, "say")).numel() == 1
    assert len(prompt_tokens(make_tokenizer(), "say", raw=True)) == 1


def test_the_output_embedding_meets_the_last_positions_alone_and_in_one_piece():
    model, seen = make_model().eval(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generate(model, make_tokenizer(), ["say", "what is one plus two"], max_new_tokens=3)
    assert len(seen) > 1
    assert all(hidden.shape[:2] == (2, 1) and hidden.is_contiguous() for hidden in seen)

"""Keys with spare room are transformers' own, whatever is done to them meanwhile."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

import tiny
from spectune.bases.generation import cache_key
from spectune.speed import key_cache
from spectune.speed.key_cache import GrowingLayer, growing_cache


def states(count, rows=2):
    return torch.randn(rows, 3, count, 4), torch.randn(rows, 3, count, 4)


def same(ours, theirs):
    return torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@torch.no_grad()
def test_a_layer_is_transformers_own(monkeypatch):
    monkeypatch.setattr(key_cache, "_SPARE", 4)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for step in range(40):
        new = states(1 + step % 3, rows=4 if 11 < step <= 19 else 2)
        assert all(torch.equal(a, b) for a, b in zip(ours.update(*new), theirs.update(*new), strict=True))
        for layer in (ours, theirs):
            if step % 7 == 6:
                layer.crop(-3)
            if step == 11:
                layer.batch_repeat_interleave(2)
            if step == 19:
                layer.batch_select_indices(torch.tensor([3, 0]))
            if step == 23:
                layer.reorder_cache(torch.tensor([1, 0]))
        assert same(ours, theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()


@torch.no_grad()
def test_what_was_held_before_is_written_on_by_its_holder_alone():
    layer = GrowingLayer()
    before = [t.clone() for t in layer.update(*states(3))]
    copied = copy.deepcopy(layer)
    layer.keys = layer.keys.clone()  # as whoever changes a layer by hand
    for one in (layer, copied):
        one.update(*states(2))
    assert all(torch.equal(t[:, :, :3], old) for t, old in zip((copied.keys, copied.values), before, strict=True))
    assert not torch.equal(layer.keys, copied.keys)


@torch.no_grad()
def test_memory_is_taken_once_in_many_tokens():
    layer, places = GrowingLayer(), set()
    for _ in range(500):
        keys, _ = layer.update(*states(1))
        places.add(keys.data_ptr())
    assert len(places) < 12


def test_gradients_go_through_it():
    keys, values = states(3)
    layer = GrowingLayer()
    layer.update(keys.requires_grad_(), values)
    layer.update(*states(2))
    layer.keys.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def tiny_of(kind, config, **settings):
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, **settings}
    return kind(config(**shape)).eval()


def test_which_layers_have_room():
    mistral = tiny_of(
        MistralForCausalLM, MistralConfig, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=4,
    )  # fmt: skip
    assert all(type(layer) is GrowingLayer for layer in growing_cache(tiny.llama()).layers)
    assert not any(type(layer) is GrowingLayer for layer in growing_cache(mistral).layers)
    assert growing_cache(tiny_of(MambaForCausalLM, MambaConfig, state_size=4)) is None
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    assert growing_cache(T5ForConditionalGeneration(t5)) is None


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_goes_on_as_it_does_with_transformers_own(beams):
    torch.manual_seed(0)
    model = tiny.llama().eval()
    ids, mask = torch.randint(3, 50, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 30, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = [
        model.generate(input_ids=ids, attention_mask=mask, **{cache_key(model): cache}, **settings)
        for cache in (growing_cache(model), DynamicCache(config=model.config))
    ]
    assert torch.equal(*found)

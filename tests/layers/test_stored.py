"""Adapted models are copied, pickled, saved and loaded like any other; tied weights and wrappers survive."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

import spectune
import tiny
from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers

METHODS = [
    "svf",
    "svft:pattern=random,width=1",
    "lora:rank=2",
    "pissa:rank=2",
    "dora:rank=2",
    "adalora:rank=2,total_steps=20",
]


def small(method) -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Conv1D(5, 8))
    spectune.adapt(model, method)
    with torch.no_grad():
        for parameter in adapted_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adapted_parameters(model):
    return [p for n, p in model.named_parameters() if ".adapters." in n]


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied_by", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_answers_alike_and_goes_its_own_way(method, copied_by):
    model, x = small(method), torch.randn(3, 6)
    y = model(x)
    copied = copied_by(model)
    assert torch.equal(copied(x), y)
    assert type(copied[0]) is type(model[0])
    assert copied[0].selection is copied[2].selection is not model[0].selection

    optimizer = torch.optim.SGD(adapted_parameters(copied), lr=0.1)
    copied(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(copied(x), y)
    spectune.activate(copied, None)
    assert torch.equal(model(x), y)
    spectune.detach(copied)
    assert not adapted_layers(copied)
    assert type(copied[0]) is nn.Linear
    assert type(copied[2]) is Conv1D
    assert all(p.requires_grad for p in copied.parameters())
    assert len(adapted_layers(model)) == 2
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_the_state_dict_keeps_the_bases_names_and_round_trips(method):
    plain = {n for n, _ in nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Conv1D(5, 8)).named_parameters()}
    model, x = small(method), torch.randn(3, 6)
    state = model.state_dict()
    assert {key for key in state if ".adapters." not in key} == plain
    other = small(method)
    with torch.no_grad():
        other[0].weight.zero_()
    other[0].load_state_dict({k.removeprefix("0."): v for k, v in state.items() if k.startswith("0.")})
    other[2].load_state_dict({k.removeprefix("2."): v for k, v in state.items() if k.startswith("2.")})
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    if method == "lora:rank=2":  # without a basis, the state is everything
        assert torch.equal(other(x), model(x))


def tied() -> Any:
    model = tiny.llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


IDS = torch.arange(5, 15)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def trained(model, *targets):
    spectune.adapt(model, "svf", *targets)
    with torch.no_grad():
        for parameter in adapted_parameters(model):
            parameter.mul_(1.2)
    return model


def test_saving_an_adapted_model_and_loading_it_gives_what_it_answers(tmp_path):
    model = tied()
    plain = logits(model)
    expected = logits(trained(model))
    assert not torch.allclose(expected, plain)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(spectune.detach(model)), plain)


def test_forward_hooks_and_moves_between_dtypes_go_on_working():
    model: Any = nn.Sequential(nn.Linear(6, 4))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    spectune.adapt(model, "dora:inner=svf")
    model(torch.randn(2, 6))
    assert seen == [1]
    assert model.double()(torch.randn(2, 6).double()).dtype == torch.float64
    assert model.bfloat16()(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


def test_a_model_on_the_meta_device_is_adapted_for_counting():
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(600, 400))
    spectune.adapt(model, "dora:inner=pissa,rank=8")
    assert sum(p.numel() for p in adapted_parameters(model)) == 8 * 1000 + 400
    assert all(p.is_meta for p in model.parameters())


def test_memory_of_zeros_is_never_taken_for_what_was_kept():
    (basis,) = spectune.adapt(nn.Sequential(nn.Linear(6, 5)), "svf")[0].bases.values()
    for _ in range(101):
        with pytest.raises(SpectuneError, match="to_empty"):
            basis.check_kept(torch.zeros_like)


@pytest.mark.parametrize("method", ["svf", "pissa:rank=2", "dora:inner=svf"])
def test_frozen_tensors_that_no_state_has_are_not_thrown_away(method):
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    spectune.adapt(model, method)
    x = torch.randn(3, 6)
    before = model(x)
    for _ in range(3):
        with pytest.raises(SpectuneError, match="to_empty"):
            model.to_empty(device="cpu")
    assert torch.equal(model(x), before)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.to(dtype)
        assert model(x.to(dtype)).isfinite().all()
    spectune.detach(model)
    model.to_empty(device="cpu")

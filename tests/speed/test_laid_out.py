"""Layers that are laid out answer what they did, and leave what is not theirs to answer."""

import copy

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune.speed.dense import PackedWeight
from spectune.speed.laid_out import laid_out

pytestmark = pytest.mark.skipif(not PackedWeight.takes(torch.ones(2, 2)), reason="no such products here")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4, bias=False)).requires_grad_(False)


def calls(monkeypatch):
    made = []
    linear = PackedWeight.linear
    monkeypatch.setattr(PackedWeight, "linear", lambda *args: made.append(1) or linear(*args))
    return made


def test_the_answer_is_the_layers(model, monkeypatch):
    x, made = torch.randn(3, 5, 12), calls(monkeypatch)
    expected = model(x)
    with laid_out(model):
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)
    assert len(made) == 2
    assert torch.equal(model(x), expected)
    assert not any("forward" in vars(module) for module in model)
    size = 4 * (12 * 16 + 16 * 4)
    for room, taken in ((2 * size, 2), (2 * size - 1, 0)):
        with laid_out(model, room):
            assert sum("forward" in vars(module) for module in model) == taken


def test_what_was_written_or_replaced_answers(model, monkeypatch):
    x, made = torch.randn(3, 12), calls(monkeypatch)
    with laid_out(model):
        model(x)
        model[0].weight.data.mul_(1)
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[2].weight = nn.Parameter(torch.ones(4, 16), requires_grad=False)
        answer = model(x)
    assert len(made) == 2
    assert torch.equal(answer, model(x))


def test_gradients_and_autocast_go_by_the_layer(model):
    x = torch.randn(3, 12, requires_grad=True)
    with laid_out(model):
        model(x).sum().backward()
        assert x.grad.abs().sum() > 0
        model[0].bias.requires_grad_()
        model(x.detach()).sum().backward()
        assert model[0].bias.grad.abs().sum() > 0
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16


def test_what_someone_replaced_stays_theirs(model):
    with laid_out(model):
        model[0].forward = own = lambda x: x
    assert model[0].forward is own
    with laid_out(model):
        assert model[0].forward is own


def test_a_model_with_adapters_and_a_tied_head(monkeypatch):
    torch.manual_seed(0)
    model = tiny.llama().eval().requires_grad_(False)
    spectune.adapt(model, "lora:rank=2")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected, made = model(ids).logits, calls(monkeypatch)
        with laid_out(model):
            torch.testing.assert_close(model(ids).logits, expected)
    assert len(made) == 1  # the head: all other linear layers are adapted

"""Layers that are laid out answer what they did, and leave what is not theirs to answer."""

import copy

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune.speed import dense
from spectune.speed.dense import PackedWeight
from spectune.speed.laid_out import laid_out

pytestmark = pytest.mark.skipif(not PackedWeight.takes(torch.ones(2, 2)), reason="no such products here")


@pytest.fixture(autouse=True)
def one_row_pays(monkeypatch):
    """A processor that lays out at once."""
    monkeypatch.setattr(dense, "least_rows", lambda _: 1)


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


METHODS = ["lora:rank=2", "pissa:rank=2", "svf", "dora:inner=lora,rank=2", "dora:inner=svf", "lora_xs:rank=2"]


def moved(model, name="default"):
    for layer in spectune.layers.adapted.adapted_layers(model).values():
        for parameter in layer.adapters[name].parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_adapted_layers_and_a_tied_head(method, monkeypatch):
    torch.manual_seed(0)
    model = tiny.llama().eval().requires_grad_(False)
    spectune.adapt(model, method)
    moved(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected, made = model(ids).logits, calls(monkeypatch)
        with laid_out(model):
            torch.testing.assert_close(model(ids).logits, expected)
        assert len(made) == 1 + len(spectune.layers.adapted.adapted_layers(model))
        assert torch.equal(model(ids).logits, expected)


def test_rows_with_different_adapters(monkeypatch):
    torch.manual_seed(0)
    model = tiny.llama().eval().requires_grad_(False)
    names = [f"a{i}" for i in range(len(METHODS))]
    for name, method in zip(names, METHODS, strict=True):
        spectune.adapt(model, method, name=name)
        moved(model, name)
    rows = [*names, None, {"a0": 0.5, "a2": -0.3}]
    ids = torch.randint(0, 50, (len(rows), 4))
    with torch.no_grad(), spectune.route(model, rows):
        expected, made = model(ids).logits, calls(monkeypatch)
        with laid_out(model):
            torch.testing.assert_close(model(ids).logits, expected)
    assert len(made) == 1 + len(spectune.layers.adapted.adapted_layers(model))


def test_an_adapted_layer_answers_with_what_was_written(model, monkeypatch):
    spectune.adapt(model, "lora:rank=2", targets=["0"])
    moved(model)
    x, made = torch.randn(3, 12), calls(monkeypatch)
    with laid_out(model), torch.no_grad():
        model(x)
        with laid_out(model):  # which finds all laid out
            model(x)
        assert len(made) == 4
        model[0].weight.mul_(2)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(model(x), expected)
        assert len(made) == 5
    assert torch.equal(model[:1](x), copy.deepcopy(model)[:1](x))
    assert model[0].laid is None


def test_gradients_go_by_the_adapted_layer(model):
    spectune.adapt(model, "lora:rank=2", targets=["0"])
    moved(model)
    x = torch.randn(3, 12, requires_grad=True)
    model(x).sum().backward()
    expected = x.grad.clone()
    with laid_out(model):
        x.grad = None
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_one_prompt_is_no_reason_where_one_row_gains_nothing(model, monkeypatch):
    monkeypatch.setattr(dense, "least_rows", lambda _: 2)
    made, lay_out = [], PackedWeight.__init__
    monkeypatch.setattr(PackedWeight, "__init__", lambda *args: made.append(1) or lay_out(*args))
    with laid_out(model), torch.no_grad():
        for count in (5, 1, 1):
            model(torch.ones(count, 12))
        assert not made
    with laid_out(model), torch.no_grad():
        for count in (5, 1, 1, 3):
            model(torch.ones(count, 12))
    assert len(made) == 2

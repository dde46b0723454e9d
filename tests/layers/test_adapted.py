"""The adapted layer: the weights of its updates, alone, mixed and by row."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
from spectune.layers import adapted, watched_layer
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.modules import find_linear, is_linear
from spectune.layers.taking import adapted_class


def layer(*methods) -> Any:
    model = nn.Sequential(nn.Linear(6, 8))
    for name, method in zip("abc", methods, strict=False):
        spectune.adapt(model, method, name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "lora_xs:rank=3,alpha=6", "dora:inner=svf"])
def test_the_weight_of_an_update_multiplies_that_of_its_adapter(method):
    model, x = layer(method, method), torch.randn(4, 6)
    for name, own in (("a", 0.25), ("b", -3.0)):
        model[0].adapters[name][0].weight = own
    spectune.activate(model, None)
    plain = model(x)
    parts = {}
    for name, own in (("a", 0.25), ("b", -3.0)):
        spectune.activate(model, name)
        update = model[0].adapters[name][0]
        parts[name] = model(x) - plain
        dW = update.method.delta(model[0].tensors(update), model[0].weight)
        torch.testing.assert_close(parts[name], own * x @ dW.T)
    spectune.activate(model, {"a": 2.0, "b": 0.5})
    torch.testing.assert_close(model(x), plain + 2 * parts["a"] + 0.5 * parts["b"])
    with spectune.route(model, ["b", None, {"a": 2.0}, {"a": 1.0, "b": 1.0}]):
        routed = model(x) - plain
    expected = [parts["b"][0], 0 * plain[1], 2 * parts["a"][2], parts["a"][3] + parts["b"][3]]
    torch.testing.assert_close(routed, torch.stack(expected))
    merged = spectune.activate(model, {"a": 2.0, "b": 0.5})
    torch.testing.assert_close(spectune.merge(merged)(x), plain + 2 * parts["a"] + 0.5 * parts["b"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_norm_is_computed_once_until_something_is_written(context, monkeypatch):
    model, x = layer("dora:rank=2"), torch.randn(4, 6)
    update = model[0].adapters["a"][0]
    computed, ratio = [], type(update.method).ratio
    monkeypatch.setattr(type(update.method), "ratio", lambda *args: computed.append(1) or ratio(*args))

    def expected():
        return x @ (model[0].weight + update.method.delta(model[0].tensors(update), model[0].weight)).T + model[0].bias

    def answers(times):
        before = len(computed)
        with context():
            for _ in range(3):
                torch.testing.assert_close(model(x), expected())
        assert len(computed) - before == times

    answers(1)
    answers(0)
    for parameter in update.parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
        answers(1)
    model(x).sum().backward()  # as optimizers may write past the counter of writes
    update.magnitude.data.mul_(2.0)
    answers(1)
    update.magnitude.data = 3 * update.magnitude.data
    answers(1)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected())


def test_the_class_is_a_subclass_made_once():
    class Own(nn.Linear):
        pass

    assert adapted_class(Own) is adapted_class(Own)
    assert issubclass(adapted_class(Own), (Adapted, Own))
    model: Any = nn.Sequential(Own(3, 3))
    spectune.adapt(model, "svf")
    assert isinstance(model[0], Own)
    assert is_linear(model[0])
    assert "svf" not in repr(spectune.detach(model)).lower()
    assert type(model[0]) is Own


def test_what_it_holds_is_told_and_found():
    model = layer("svf", "lora:rank=2")
    assert "SVF(" in repr(model)
    assert "LoRA(rank=2" in repr(model)
    assert adapted_layers(model) == {"0": model[0]}
    assert find_linear(model, "0") is model[0]
    with pytest.raises(spectune.SpectuneError, match=r"no linear layer '0\.adapters'"):
        find_linear(model, "0.adapters")


def test_nothing_chosen_costs_nothing_and_changes_nothing():
    model, x = layer("svf"), torch.randn(2, 6)
    spectune.activate(model, {"a": 0.0})
    y = model(x)
    assert not y.requires_grad
    spectune.detach(model)
    assert torch.equal(y, model(x))


def test_a_routed_answer_asks_each_row_once(monkeypatch):
    """Every layer is asked for every token: all rows times all adapters would be most of the time."""
    model, names = nn.Sequential(nn.Linear(6, 6)), [f"a{i}" for i in range(24)]
    for name in names:
        spectune.adapt(model, "lora:rank=2", name=name)
    asked = []
    own = adapted.weight_at
    for module in (adapted, watched_layer):
        monkeypatch.setattr(module, "weight_at", lambda *where: asked.append(where) or own(*where))
    with torch.no_grad(), spectune.route(model, names):
        model(torch.randn(24, 6))
        assert len(asked) <= 24
        del asked[:]
        assert model[0].weight is not None  # read by somebody else, who is told
        assert len(asked) <= 24

"""The adapted layer: the weights of its updates, alone, mixed and by row."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
from spectune.layers.adapted import Adapted, adapted_class, adapted_layers, find_linear, is_linear


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

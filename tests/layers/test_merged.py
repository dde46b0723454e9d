"""W' as a plain tensor: what cannot hold it, and what has none."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations

import spectune
from spectune import SpectuneError
from spectune.layers.merged import active_adapters, merged_bias, merged_weight, weight_with_gradients


def adapted(*methods: str, names=("a", "b")) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    for method, name in zip(methods, names, strict=False):
        spectune.adapt(model, method, name=name)
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, model[0]


def test_adapters_of_no_weight_have_no_part():
    model, layer = adapted("lora:rank=2", "svf")
    spectune.activate(model, {"a": 0.0, "b": 0.5})
    assert active_adapters(layer) == (("b", 0.5),)
    assert active_adapters(layer, {"a": {layer: 2.0}, "b": {}}) == (("a", 2.0),)
    assert active_adapters(layer, {}) == ()


@pytest.mark.parametrize("methods", [("lora:rank=2",), ("dora:inner=svf",), ("svf", "lora:rank=3")])
def test_w_with_gradients_is_the_merged_one_and_has_the_gradients_of_the_answer(methods):
    model, layer = adapted(*methods)
    spectune.activate(model, dict(zip("ab", (1.0, -0.5), strict=False)) if len(methods) > 1 else "a")
    spectune.trainable(model, list("ab")[: len(methods)])
    W = weight_with_gradients(layer)
    torch.testing.assert_close(W, merged_weight("0", layer, active_adapters(layer)))
    x, parameters = torch.randn(4, 6, dtype=torch.float64), list(layer.adapters.parameters())
    by_weight = torch.autograd.grad((x @ W.mT + layer.bias).tanh().sum(), parameters)
    by_answer = torch.autograd.grad(model(x).tanh().sum(), parameters)
    for one, other in zip(by_weight, by_answer, strict=True):
        torch.testing.assert_close(one, other)


def test_where_there_is_no_one_w_it_is_refused():
    model, layer = adapted("lora:rank=2,dropout=0.5", "lora:rank=2")
    with pytest.raises(SpectuneError, match="dropout"):
        weight_with_gradients(spectune.activate(model.train(), "a")[0])
    assert weight_with_gradients(model.eval()[0]).shape == (5, 6)
    with spectune.route(model, ["a", "b"]), pytest.raises(SpectuneError, match="rows of the batch"):
        weight_with_gradients(layer)
    with spectune.route(model, ["b", "b"]):
        assert weight_with_gradients(layer).shape == (5, 6)


def test_a_weight_that_is_computed_cannot_hold_a_sum():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)))
    spectune.adapt(model, "lora:rank=2", name="a")
    with pytest.raises(SpectuneError, match="'0' is computed from other parameters"):
        merged_weight("0", model[0], (("a", 1.0),))


def test_a_bias_comes_only_with_an_update_that_has_one():
    _, layer = adapted("svf")
    assert merged_bias(layer, (("a", 1.0),)) is None
    model = nn.Sequential(nn.Linear(6, 5))
    spectune.adapt(model, "lora:rank=2", name="a", bias="lora_only")
    with torch.no_grad():
        for name, parameter in model[0].adapters.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(1.0)
                assert parameter.shape == (5,), name
    torch.testing.assert_close(merged_bias(model[0], (("a", 0.5),)), model[0].bias + 0.5)

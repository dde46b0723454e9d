"""An adapted layer without its adapters: what it tells updates of W, and which bases are of the W that is there."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

import spectune
from spectune.errors import SpectuneError

KINDS = ("linear", "conv1d", "no bias")


def adapted(kind="linear", method="pissa:rank=2", dtype=torch.float64) -> Any:
    """Return an adapted layer, W (7 x 5) and its bias."""
    torch.manual_seed(0)
    plain = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind != "no bias")
    plain.to(dtype)
    if plain.bias is not None:
        nn.init.normal_(plain.bias)
    W = plain.weight.detach().clone()
    model = spectune.adapt(nn.Sequential(plain), method)
    return model[0], (W.mT if kind == "conv1d" else W), plain.bias


def key_of(layer):
    (key,) = layer.bases
    return key


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_update_may_ask(kind):
    layer, W, bias = adapted(kind)
    x, R = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    y = x @ W.mT if bias is None else x @ W.mT + bias
    base = layer.base(y)
    torch.testing.assert_close(base.output(), x @ W.mT)
    torch.testing.assert_close(base.output(2 * x), 2 * x @ W.mT)
    torch.testing.assert_close(base.project(R), W @ R.mT)
    torch.testing.assert_close(base.rows(torch.tensor([6, 0])), W[[6, 0]])
    torch.testing.assert_close(base.norms(), W.square().sum(1).sqrt())
    assert base.bias is bias
    assert base.owns(key_of(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_answer_is_that_of_the_layer_before(kind):
    layer, W, bias = adapted(kind)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = x @ W.mT if bias is None else x @ W.mT + bias
    torch.testing.assert_close(layer._plain(x), expected)
    torch.testing.assert_close(layer._product(x, bias), expected)
    layer.train()
    torch.testing.assert_close(layer._plain(x.requires_grad_()), expected)


def test_factors_in_another_dtype_are_multiplied_in_that_of_the_weight():
    layer, W, _ = adapted(dtype=torch.bfloat16)
    R = torch.randn(2, 5)
    projected = layer.base().project(R)
    assert projected.dtype == torch.bfloat16
    torch.testing.assert_close(projected.float(), W.float() @ R.bfloat16().float().mT, atol=2e-2, rtol=1e-2)


def test_an_answer_at_hand_is_there_in_a_forward_pass_alone():
    layer, _, _ = adapted()
    with pytest.raises(RuntimeError, match="this update was asked for outside a forward pass"):
        layer.base().output()


@pytest.mark.parametrize("write", ["data", "version", "load"])
def test_a_weight_that_was_written_to_is_another_one_and_the_same_once_it_is_back(write):
    layer, W, _ = adapted()
    before, key = layer.base().seen(), key_of(layer)
    assert layer.base().seen()[0] is before[0]

    def put(values):
        if write == "data":
            layer.weight.data.copy_(values)
        elif write == "version":
            with torch.no_grad():
                layer.weight.copy_(values)
        else:
            layer.load_state_dict({**layer.state_dict(), "weight": values})

    put(2 * W)
    assert layer.base().seen()[0] is not before[0]
    torch.testing.assert_close(layer.base().norms(), 2 * W.square().sum(1).sqrt())
    assert not layer.owns(key)
    assert not layer.owns(key, once=True)
    put(W)
    assert layer.owns(key)


def test_a_basis_that_is_not_there_belongs_to_no_other_weight():
    layer, _, _ = adapted()
    layer.weight.data.mul_(2)
    assert layer.owns("another")


def test_tensors_are_the_trained_and_the_frozen_ones():
    layer, _, _ = adapted("linear", "pissa:rank=2")
    (update,) = layer.adapters["default"]
    found = layer.tensors(update)
    assert found.keys() == {*update.trained(), *layer.bases[update.basis_key].tensors()}
    assert all(found[name] is value for name, value in update.trained().items())


def test_an_adapter_that_was_made_on_the_meta_device_has_no_values():
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(5, 7))
    spectune.adapt(model, "pissa:rank=2")
    model[0].weight = nn.Parameter(torch.randn(7, 5))
    model[0].bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(SpectuneError, match="the weight of '0' was on the meta device when it was adapted"):
        model(torch.randn(2, 5))


def test_where_its_product_may_be_taken_here():
    layer, _, _ = adapted("linear", "lora:rank=2", torch.float32)
    x = torch.randn(2, 5)
    assert layer.fuses(x)
    assert not layer.fuses(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer.fuses(x)
        assert layer.fuses(x.to("meta"))
    for parameter in (layer.weight, layer.bias):
        parameter.requires_grad_(True)
        assert not layer.fuses(x)
        parameter.requires_grad_(False)
    assert layer.fuses(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(layer.fuses(row)) or row)(x)
    assert seen == [False]


def test_where_a_weight_may_be_laid_out():
    assert adapted("linear")[0].may_be_laid_out
    assert not adapted("conv1d")[0].may_be_laid_out

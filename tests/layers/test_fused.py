"""W' as `fused` makes it, beside float64."""

import pytest
import torch
import torch.nn as nn

import spectune
from spectune.layers.fused import Fused, whole_weight


def layer_of(method, dtype, names=("a",), side=80):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(side, side + 16, bias=False)).to(dtype)
    for name in names:
        spectune.adapt(model, method, name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or parameter.dtype == torch.float32:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)[0]


def made_by(fused, layer, parts):
    """W', whatever it is laid out as: what it makes of the identity."""
    one = torch.eye(layer.in_features, dtype=layer.weight.dtype)
    return fused.answer(layer.selection.scope_of_model, parts, one).T


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
@pytest.mark.parametrize("method", ["svf", "svft", "lora:rank=4", "lora:rank=70,rslora=true", "dora:inner=svf"])
def test_it_is_rounded_once(method, names):
    layer = layer_of(method, torch.bfloat16, names[:1] if method.startswith("dora") else names)
    parts = [(update, 0.7) for name in layer.adapters for update in layer.adapters[name]]
    fused, W = Fused(layer), layer.weight.detach().double()
    assert fused.make(layer.selection.scope_of_model, parts)
    dW = sum(
        0.7 * update.weight * update.method.delta({k: v.double() for k, v in layer.tensors(update).items()}, W)
        for update, _ in parts
    )
    made = made_by(fused, layer, parts).double()
    # W' lies within half a step of bfloat16 of the exact sum, but for the factors' own rounding
    assert ((made - (W + dW)).abs() <= 2**-8 * (W + dW).abs() + 2**-7 * dW.abs().max()).all()
    exact = whole_weight(layer, parts, torch.float32).double()
    assert torch.allclose(exact, W + dW, atol=1e-4)
    fused.end()


def test_low_ranks_and_other_dtypes_are_summed_in_float32():
    for method, dtype in (("lora:rank=4", torch.bfloat16), ("svf", torch.float16), ("svf", torch.float32)):
        layer = layer_of(method, dtype)
        parts = [(update, 1.0) for update in layer.adapters["a"]]
        fused = Fused(layer)
        assert fused.make(layer.selection.scope_of_model, parts)
        assert torch.equal(made_by(fused, layer, parts), whole_weight(layer, parts))
        fused.end()

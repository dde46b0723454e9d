"""Calls of an adapted layer that are not the usual one: right, or one sentence."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

import spectune
from methods.cases import EVERY, name
from spectune import SpectuneError

FROZEN = ("svf", "svft", "lora_xs", "vera")  # methods that do not train R


def network(method: Any = "lora:rank=2", layer: Any = None) -> Any:
    torch.manual_seed(0)
    model = spectune.adapt(nn.Sequential(nn.Linear(8, 8) if layer is None else layer), method)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def values(*shape) -> Any:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", EVERY, ids=name)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions(method):
    model, x, direction = network(method), values(3, 8), values(3, 8)
    expected = model(x).detach()
    torch.testing.assert_close(torch.func.vmap(model)(x), expected)
    _, moved = torch.func.jvp(model, (x,), (direction,))
    torch.testing.assert_close(moved, model(x + direction) - expected)  # it is linear
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(dual.tangent, moved)
    jacobian = torch.func.jacrev(model)(x[:1])
    torch.testing.assert_close(torch.einsum("iokl,kl->io", jacobian, direction[:1]), moved[:1])

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    found = torch.func.grad(loss)(trained)
    _, slope = torch.func.jvp(loss, (trained,), (trained,))  # DoRA's norm is a constant in both directions
    torch.testing.assert_close(slope, sum((found[n] * p).sum() for n, p in trained.items()))
    if "adalora" not in name(method):  # which adds its penalty to the gradients of a backward pass
        model(x).square().sum().backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[key], parameter.grad)


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "dora:rank=2", "dora:inner=svf"])
def test_models_of_an_ensemble(method):
    x = values(3, 8)
    ensemble = [network(method) for _ in range(3)]
    for i, model in enumerate(ensemble):
        for p in model[0].adapters.parameters():
            p.data *= i  # one of them leaves nothing of W's rows, where the method is DoRA
    parameters, buffers = torch.func.stack_module_state(ensemble)

    def answer(parameters, buffers):
        return torch.func.functional_call(ensemble[0], (parameters, buffers), (x,))

    found = torch.func.vmap(answer)(parameters, buffers)
    for model, y in zip(ensemble, found, strict=True):
        torch.testing.assert_close(y, model(x))
    slopes = torch.func.vmap(torch.func.grad(lambda p, b: answer(p, b).square().sum()))(parameters, buffers)
    for i, model in enumerate(ensemble[1:], 1):
        model(x).square().sum().backward()
        for key, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(slopes[key][i], p.grad)


@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2", "svft:pattern=banded,width=2"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_of_plain_operations_with_gradients_or_without(method):
    model, x = network(method), values(3, 8)
    with pytest.raises(SpectuneError, match="once before"):
        torch.jit.trace(model, x)
    model(x)
    traced: Any = torch.jit.trace(model, x)  # which compares it with a trace without gradients
    torch.testing.assert_close(traced(x[:2]), model(x[:2]))
    names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), trained) for m in (traced, model))
    for key, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=key)
    with pytest.raises(SpectuneError, match=r"spectune\.merge"):
        torch.jit.script(model)
    assert torch.jit.script(spectune.merge(model).float())(x.float()).shape == (3, 8)


@pytest.mark.parametrize("method", EVERY, ids=name)
def test_a_gradient_of_a_gradient(method):
    model, x = network(method), values(3, 8)
    text = name(method).removeprefix("dora:inner=")

    def penalty(x):
        return torch.func.grad(lambda x: model(x).pow(3).sum())(x).square().sum()

    expected = torch.func.grad(penalty)(x)
    x.requires_grad_()
    y = model(x).pow(3).sum()
    if text.startswith(FROZEN):
        with pytest.raises(SpectuneError, match=r"torch\.func\.grad"):
            torch.autograd.grad(y, x, create_graph=True)
    else:
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        grad.square().sum().backward()
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("method", ["dora:rank=2", "dora:inner=svf", "lora:rank=2"])
def test_before_an_operation_in_place(method):
    model, x = network(method), values(3, 8)
    after = nn.Sequential(model[0], nn.ReLU(inplace=True)).train()
    if method.startswith("dora"):
        with pytest.raises(SpectuneError, match="inplace=False"):
            after(x).sum().backward()
    else:
        after(x).sum().backward()


def test_an_input_by_its_name():
    x = values(3, 8)
    for layer, key in ((nn.Linear(8, 6), "input"), (Conv1D(6, 8), "x")):
        model = network(layer=layer)
        torch.testing.assert_close(model[0](**{key: x}), model(x))
        with pytest.raises(TypeError):
            model[0](x, other=1)


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Alone(nn.Linear):
    def forward(self, x, scale=1.0):
        return nn.functional.linear(x, self.weight, self.bias) * scale


def bent(around):
    """Return a linear layer's class that does something else around x W^T + b, given as a function of that and x."""
    return type("Bent", (nn.Linear,), {"forward": lambda self, x: around(lambda x: nn.Linear.forward(self, x), x)})


def test_layers_with_a_forward_method_of_their_own():
    x = values(3, 8)
    model = network("dora:rank=2", Scaled(8, 6))
    merged = spectune.merge(copy.deepcopy(model))
    for more in ((), (0.5,)):
        torch.testing.assert_close(model[0](x, *more), merged[0](x, *more))
    spectune.detach(model)
    assert type(model[0]) is Scaled
    model = network(layer=Alone(8, 6))
    torch.testing.assert_close(model(x), spectune.merge(copy.deepcopy(model))(x))
    with pytest.raises(SpectuneError, match="called with scale"):
        model[0](x, 3.0)
    assert spectune.activate(model, None)[0](x, 3.0).shape == (3, 6)
    for around in (
        lambda linear, x: linear(x).relu(),
        lambda linear, x: 1.05 * linear(x),
        lambda linear, x: linear(x.clamp(-1, 1)),  # the same at small inputs
        lambda linear, x: linear(x).clamp(-3, 3),
    ):
        with pytest.raises(SpectuneError, match="Bent answers otherwise"):
            network(layer=bent(around)(8, 6))
    rounds = bent(lambda linear, x: linear(x.to(torch.float8_e4m3fn).to(x.dtype)))  # as classes of few bits do
    assert network(layer=rounds(8, 6))(x).shape == (3, 6)


def test_who_wrapped_a_layer_s_forward_method_reaches_the_plain_one_when_it_is_given_back():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4)
    before = model(x)
    spectune.adapt(model, "lora:rank=2", modules_to_save=["1"])
    for part in model:
        part.forward = lambda x, inner=part.forward: inner(x)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(spectune.detach(model)(x), before)


def test_weights_that_are_not_there_yet():
    with pytest.raises(SpectuneError, match="lazy layer"):
        network(layer=nn.LazyLinear(8))
    small: Any = nn.Linear(16, 16)
    small.weight = nn.Parameter(small.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(SpectuneError, match="float8"):
        spectune.adapt(nn.Sequential(small), "lora:rank=2")
    for method in ("lora:rank=2", "svf", "dora:rank=2"):
        with torch.device("meta"):
            model: Any = spectune.adapt(nn.Sequential(nn.Linear(8, 8)), method)
        if method.startswith("lora"):
            assert model(torch.randn(2, 8, device="meta")).is_meta
        model.load_state_dict({"0.weight": torch.randn(8, 8), "0.bias": torch.randn(8)}, strict=False, assign=True)
        with pytest.raises(SpectuneError, match="meta device"):
            model(torch.randn(2, 8))
    with torch.device("meta"):
        model = spectune.adapt(nn.Sequential(nn.Linear(8, 8)), "lora:rank=2")
    other = spectune.adapt(nn.Sequential(nn.Linear(8, 8)), "lora:rank=2")
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(model(torch.ones(2, 8)), other(torch.ones(2, 8)))


def test_weights_of_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(8, 8)
    model: Any = spectune.adapt(nn.Sequential(layer), "lora:rank=2")
    with torch.no_grad():
        assert model(torch.randn(2, 8)).shape == (2, 8)
    with pytest.raises(SpectuneError, match="inference_mode"):
        model(torch.randn(2, 8))

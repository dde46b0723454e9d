"""DoRA where an update takes nearly all of a row of W, or a magnitude is zero: as float64 has it."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
from spectune import SVF, DoRA, LoRA, PiSSA

LEFT = [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0]


def layer_with_little_left(method, left, dtype=torch.float32) -> Any:
    """Return an adapted layer (6 x 10) of which every other row has `left` of it left."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(10, 6)).to(dtype)
    spectune.adapt(model, method, name="a").eval()
    update = model[0].adapters["a"][0]
    with torch.no_grad():
        W = model[0].weight.float()
        if isinstance(method.inner, SVF):
            update.z.fill_(left)
        elif isinstance(method.inner, PiSSA):
            t = model[0].tensors(update)
            kept = torch.ones(6, 1)
            kept[::2] = left
            update.dB.copy_((kept - 1) * t["B0"])
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            kept = torch.ones(6, 1)
            kept[::2] = left
            update.A.copy_(S[:, None] * Vh)
            update.B.copy_((kept - 1) * U / update.method.inner.scale)
    return model


def expected(model, x, name="a"):
    """Return the answer in float64, and the gradients of x and what trains."""
    layer = model[0]
    update = layer.adapters[name][0]
    frozen = {k: v.double() for k, v in layer.tensors(update).items()}
    trained = {k: v.detach().double().requires_grad_() for k, v in update.trained().items()}
    x = x.detach().double().requires_grad_()
    f = update.method.inner.factors({**frozen, **trained})
    updated = layer.weight.detach().double() + f.dense()
    norms = updated.detach().norm(dim=1)
    ratio = torch.where(norms > 0, trained["magnitude"] / norms.clamp_min(1e-300), 1.0)
    y = x @ (ratio[:, None] * updated).T + layer.bias.detach().double()
    return y, {"x": x, **trained}


METHODS = [DoRA(LoRA(rank=6)), DoRA(PiSSA(rank=6)), DoRA(SVF())]


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.inner.name)
def test_answers_and_gradients_are_those_of_float64(method, left):
    model = layer_with_little_left(method, left)
    x = torch.randn(4, 3, 10)
    y, leaves = expected(model, x)
    loss = torch.randn(4, 3, 6, dtype=torch.float64)
    (y * loss).sum().backward()
    x.requires_grad_()
    ours = model(x)
    (ours * loss).sum().backward()
    close: Any = {"rtol": 1e-5, "atol": 1e-5 * float(y.detach().abs().max())}
    torch.testing.assert_close(ours.double(), y, **close)
    grads = {"x": x.grad, **{k: v.grad for k, v in model[0].adapters["a"][0].trained().items()}}
    for name, leaf in leaves.items():
        largest = float(leaf.grad.abs().max())
        torch.testing.assert_close(grads[name].double(), leaf.grad, rtol=1e-4, atol=2e-5 * largest)
    dense = model[0].weight + spectune.extract(model, "a").delta("0")
    torch.testing.assert_close((x @ dense.T + model[0].bias).double(), y, **close)


@pytest.mark.parametrize("left", [1e-3, 0.0])
def test_rows_of_a_batch(left):
    model = layer_with_little_left(METHODS[0], left)
    spectune.adapt(model, DoRA(LoRA(rank=2)), name="b").eval()
    with torch.no_grad():
        model[0].adapters["b"][0].B.normal_()
        x = torch.randn(3, 2, 10)
        spectune.activate(model, None)
        wanted = torch.cat([expected(model, x[:1])[0], model(x[1:2]), expected(model, x[2:], "b")[0]])
        with spectune.route(model, ["a", None, "b"]):
            torch.testing.assert_close(model(x).double(), wanted.double(), rtol=1e-5, atol=1e-5)
        spectune.activate(model, {"a": 0.5})
        halfway = (model[0].plain_class.forward(model[0], x).double() + expected(model, x)[0]) / 2
        torch.testing.assert_close(model(x).double(), halfway, rtol=1e-5, atol=1e-5)


def test_a_base_of_16_bits():
    model = layer_with_little_left(METHODS[0], 0.3, torch.bfloat16)
    x = torch.randn(5, 10).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected(model, x)[0], rtol=2e-2, atol=2e-2)


def test_what_cancels_within_the_update_is_noticed():
    """Two terms of dW, each a thousand times as long as W, that leave little of each other."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(10, 6))
    spectune.adapt(model, DoRA(LoRA(rank=2, alpha=2)), name="a")
    update = model[0].adapters["a"][0]
    with torch.no_grad():
        update.A[1] = update.A[0] + 1e-4 * torch.randn(10)
        update.B[:, 0].uniform_(500, 1000)
        update.B[:, 1] = -update.B[:, 0]
    x = torch.randn(3, 10)
    wanted, _ = expected(model, x)
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("b", [0.0, 1e-20, 1e-3, 0.5])
@pytest.mark.parametrize("magnitude", [0.0, 0.3])
def test_rows_of_zeros(b, magnitude):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 5, bias=False))
    with torch.no_grad():
        model[0].weight[::2] = 0
        spectune.adapt(model, DoRA(LoRA(rank=3)), name="a")
        update = model[0].adapters["a"][0]
        update.B.copy_(b * torch.randn(5, 3))
        update.magnitude.fill_(magnitude)
        x = torch.randn(4, 8)
        here = model(x)
        dense = model[0].weight + spectune.extract(model, "a").delta("0")
        torch.testing.assert_close(here, x @ dense.T, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spectune.merge(model)(x), here, rtol=1e-5, atol=1e-6)
    assert here.isfinite().all()


def test_an_ordinary_update_computes_no_row():
    for method in (*METHODS, DoRA(LoRA(rank=2)), DoRA(SVF())):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(64, 48))
        spectune.adapt(model, method)
        update = model[0].adapters["default"][0]
        with torch.no_grad():
            for name, p in update.trained().items():
                p.add_(0.1 * torch.randn_like(p) * (p.abs().mean() if name == "magnitude" else 1))
        assert update.ratio(model[0].tensors(update), model[0].base()).rows is None


def test_rows_too_long_for_a_norm_are_refused():
    model: Any = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[3, 0] = 2e19
    with pytest.raises(spectune.SpectuneError, match=r"'0' cannot be adapted: DoRA .* lengths .* take another method"):
        spectune.adapt(model, "dora:rank=2")
    assert type(model[0]) is nn.Linear

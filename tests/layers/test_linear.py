"""The adapted linear layer's one node against what autograd makes of the dense formula."""

import pytest
import torch
import torch.nn as nn
from test_cores import SHAPES, SIZE, build, dense

import spectune
from spectune.layers.cores import Identity
from spectune.layers.factors import Factors
from spectune.layers.linear import adapted_linear

OUT, IN, N = 6, 5, 4


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", ["identity", *SHAPES])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ratio", [False, True])
def test_values_and_gradients(kind, whole, bias, ratio):
    x, left, right = leaf(N, IN), leaf(OUT, SIZE), leaf(SIZE, IN)
    values = leaf(*SHAPES[kind]) if kind != "identity" else None
    W = None if whole else torch.randn(OUT, IN, dtype=torch.float64)
    b = torch.randn(OUT, dtype=torch.float64) if bias else None
    m = leaf(OUT) if ratio else None

    def ours(x, left, right, values, m):
        core = Identity() if values is None else build(kind, values)
        return adapted_linear(x, W, b, Factors(left, right, core, 0.7), m)

    def plain(x, left, right, values, m):
        C = torch.eye(SIZE, dtype=torch.float64) if values is None else dense(kind, values)
        y = x @ (0.7 * left @ C @ right + (0 if W is None else W)).T
        return (y if m is None else m * y) + (0 if b is None else b)

    inputs = (x, left, right, values, m)
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(ours, inputs)


def test_only_what_trains_is_kept():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x, W = torch.randn(100, 64), torch.randn(80, 64)
    left, right = torch.randn(80, 2), torch.randn(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_linear(x.requires_grad_(), W, None, Factors(left, right.requires_grad_()))
        assert any(t is x or t.data_ptr() == x.data_ptr() for t in kept)
        kept.clear()
        adapted_linear(x, W, None, Factors(left.requires_grad_(), right.detach()))
    assert not [t for t in kept if t.shape == x.shape and t.data_ptr() == x.data_ptr()]
    assert max(t.numel() for t in kept if t.data_ptr() != W.data_ptr()) == 100 * 2


def test_a_ratio_of_zero_still_learns():
    m = torch.zeros(OUT, dtype=torch.float64, requires_grad=True)
    x, W = torch.randn(N, IN, dtype=torch.float64), torch.randn(OUT, IN, dtype=torch.float64)
    left, right = torch.zeros(OUT, 1, dtype=torch.float64), torch.randn(1, IN, dtype=torch.float64)
    y = adapted_linear(x, W, None, Factors(left, right), m)
    y.sum().backward()
    assert y.abs().max() < 1e-4
    torch.testing.assert_close(m.grad, (x @ W.T).sum(0))


def test_a_ratio_near_one_is_not_lost_in_bf16():
    ratio = torch.full((8,), 1.0055)  # bf16 has nothing between 1 and 1.0078
    x, W = torch.randn(4000, 8).bfloat16().requires_grad_(), torch.eye(8).bfloat16()
    y = adapted_linear(x, W, None, Factors(torch.zeros(8, 1), torch.zeros(1, 8)), ratio)
    y.backward(grad := torch.randn(4000, 8).bfloat16())
    for after, before in ((y, x), (x.grad, grad)):
        gain = (after.double().abs().sum() / before.double().abs().sum() - 1).item()
        assert gain == pytest.approx(0.0055, rel=0.1)  # rounding is to either side


@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "svft:pattern=banded,width=1", "dora:inner=lora_xs,rank=2"])
@pytest.mark.parametrize("case", ["weight", "bias", "autocast", "other class"])
def test_where_the_weight_is_not_plain_the_layers_own_product_is_used(method, case):
    class Own(nn.Linear):
        pass

    model = nn.Sequential((Own if case == "other class" else nn.Linear)(6, 8))
    spectune.adapt(model, method)
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    update = model[0].adapters["default"][0]
    dW = update.method.delta(model[0].tensors(update), model[0].weight).detach()
    if case in ("weight", "bias"):
        getattr(model[0], case).requires_grad_(True)
    x = torch.randn(3, 6)
    expected = nn.functional.linear(x, model[0].weight + dW, model[0].bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y = model(x)
    if case == "autocast":
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)
        return
    torch.testing.assert_close(y, expected)
    if case != "other class":
        y.sum().backward()
        assert getattr(model[0], case).grad is not None


@pytest.mark.parametrize("method", ["svf", "svf:parametrization=sigmoid", "svft", "svft:pattern=banded,width=2"])
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_training_through_the_factors_of_the_weight_is_the_same(method, magnitude, shape):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(*shape)).double()
    inner = method.replace(":", ",")
    spectune.adapt(plain, f"dora:inner={inner}" if magnitude else method, factored=True)
    with torch.no_grad():
        for parameter in plain[0].adapters.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    results = []
    x = torch.randn(4, shape[0], dtype=torch.float64)
    for factored in (False, True):
        plain[0].selection.factored = factored
        leaf = x.clone().requires_grad_()
        plain.zero_grad()
        y = plain(leaf)
        (y**2).sum().backward()
        results.append((y, leaf.grad, *(p.grad.clone() for p in plain[0].adapters.parameters())))
    for kept, factored in zip(*results, strict=True):
        torch.testing.assert_close(kept, factored)
    plain.eval()
    by_weight = plain(x)
    assert torch.equal(by_weight, plain(x))
    plain[0].selection.factored = False
    assert torch.equal(by_weight, plain(x))

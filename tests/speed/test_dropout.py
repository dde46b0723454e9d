"""Dropout: how often, by what, its gradient, and that it is drawn again."""

import pytest
import torch

from spectune.speed.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.97])
def test_each_number_is_dropped_with_probability_p(dtype, p):
    torch.manual_seed(0)
    y = dropout(torch.ones(401, 503, dtype=dtype), p)
    dropped = (y == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / y.numel()) ** 0.5)
    kept = y[y != 0]
    torch.testing.assert_close(
        kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0
    )


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(1000, 1000), 0.3) == 0).double()
    for shift in (1, 2, 3, 4, 1000):
        both = (dropped.flatten()[shift:] * dropped.flatten()[:-shift]).mean().item()
        assert both == pytest.approx(0.09, abs=2e-3)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_the_ends(p, kept):
    assert torch.equal(dropout(torch.ones(3, 5), p), torch.full((3, 5), kept))


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 5), (2, 3, 5)])
def test_the_gradient_goes_where_the_numbers_went(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)
    assert set(x.grad.flatten().tolist()) <= {0.0, 65536 / (65536 - round(0.4 * 65536))}


def test_a_seed_draws_the_same_and_the_next_call_another():
    x = torch.ones(64, 64).mT
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_gradients_of_gradients_and_transforms():
    x = torch.randn(5, 7, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.4)
    mask = (y / x).detach()
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(again, 6 * mask**3 * x.detach())
    with torch.no_grad():
        value, slope = torch.func.jvp(lambda x: dropout(x, 0.4), (x.detach(),), (torch.ones(5, 7),))
    torch.testing.assert_close(value, slope * x.detach())
    assert 0 < (value == 0).sum() < value.numel()

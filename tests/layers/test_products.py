"""The products with thin factors, in float64 and in short dtypes, against dense matrices."""

import pytest
import torch

from spectune.layers.cores import Diagonal
from spectune.layers.products import add, factor, finish, over_rows, project, through_ratio

N, SIZE, RANK = 5, 7, 3


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def test_projections_and_what_a_core_makes_of_them():
    x, R, d = drawn(N, SIZE), drawn(RANK, SIZE, seed=1), drawn(RANK, seed=2)
    t, u = project(x, R, Diagonal(d), 0.5)
    torch.testing.assert_close(t, 0.5 * x @ R.mT)
    torch.testing.assert_close(u, 0.5 * x @ R.mT @ torch.diag(d))
    t, u = project(x, R)
    assert u is t
    torch.testing.assert_close(t, x @ R.mT)


@pytest.mark.parametrize("ratio", [None, 1])
@pytest.mark.parametrize("bias", [None, 2])
def test_an_update_is_added_in_place(ratio, bias):
    y, u, L = drawn(N, SIZE), drawn(N, RANK, seed=1), drawn(SIZE, RANK, seed=2)
    m = None if ratio is None else drawn(SIZE, seed=3).abs() + 0.5
    b = None if bias is None else drawn(SIZE, seed=4)
    expected = y + 0.25 * u @ L.mT
    expected = expected if m is None else expected * m
    expected = expected if b is None else expected + b
    found = add(y, u, L, 0.25, m, b)
    assert found is y
    torch.testing.assert_close(found, expected)


def test_a_ratio_near_one_keeps_its_digits_in_a_short_dtype():
    """1 + 2**-11 is 1 in bfloat16, and y (1 + 2**-11) is not y where y is at the edge of rounding up."""
    y = drawn(1, 4096, dtype=torch.bfloat16)
    ratio = torch.full((4096,), 1 + 2**-10)
    assert torch.equal(ratio.bfloat16(), torch.ones(4096, dtype=torch.bfloat16))
    exact = (y.double() * ratio.double()).bfloat16()
    found = finish(y.clone(), ratio, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=0)
    twice = finish(y.clone(), torch.full((4096,), 2.0), None)
    assert torch.equal(twice, 2 * y)


@pytest.mark.parametrize(("k", "m"), [(2, 6), (6, 2), (3, 3)])
def test_a_product_over_rows_is_the_same_either_way_round(k, m):
    a, b = drawn(N, k), drawn(N, m, seed=1)
    torch.testing.assert_close(over_rows(a, b), a.mT @ b)
    torch.testing.assert_close(over_rows(a, b, -0.5), -0.5 * a.mT @ b)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_through_a_ratio_are_autograds(with_bias):
    z, ratio = drawn(N, SIZE).requires_grad_(), (drawn(SIZE, seed=1).abs() + 0.5).requires_grad_()
    bias, grad = (drawn(SIZE, seed=2) if with_bias else None), drawn(N, SIZE, seed=3)
    y = ratio * z if bias is None else ratio * z + bias
    expected = torch.autograd.grad(y, (z, ratio), grad)
    to_z, to_ratio = through_ratio(grad, y.detach(), bias, ratio.detach())
    torch.testing.assert_close(to_z, expected[0])
    torch.testing.assert_close(to_ratio, expected[1])
    to_z, to_ratio = through_ratio(grad, None, bias, ratio.detach())
    torch.testing.assert_close(to_z, expected[0])
    assert to_ratio is None


def test_a_ratios_gradient_is_in_its_own_dtype():
    grad, y = drawn(N, SIZE, dtype=torch.bfloat16), drawn(N, SIZE, seed=1, dtype=torch.bfloat16)
    to_z, to_ratio = through_ratio(grad, y, None, torch.ones(SIZE))
    assert (to_z.dtype, to_ratio.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(to_z, grad)


def test_a_factor_in_another_dtype():
    matrix = drawn(RANK, SIZE)
    assert factor(matrix, torch.float64) is matrix
    assert torch.equal(factor(matrix, torch.bfloat16), matrix.bfloat16())

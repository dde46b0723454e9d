"""The cores against dense matrices: products, transposes, per-row values, gradients."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.layers.core_ops import (
    band_entries,
    band_indices,
    banded_product,
    sparse_product,
)
from spectune.layers.cores import Banded, Dense, Diagonal, Sparse, mix

SIZE, WIDTH, BATCH = 7, 2, 3
ROWS, COLUMNS = torch.tensor([0, 0, 3, 6, 5, 2]), torch.tensor([1, 4, 3, 0, 5, 2])
SHAPES = {"diagonal": (SIZE,), "banded": (band_entries(SIZE, WIDTH),), "sparse": (len(ROWS),), "dense": (SIZE, SIZE)}


def build(kind, values):
    if kind == "diagonal":
        return Diagonal(values)
    if kind == "banded":
        return Banded(values, SIZE, WIDTH)
    if kind == "sparse":
        return Sparse(values, ROWS, COLUMNS, SIZE)
    return Dense(values)


def dense(kind, values):
    """The core as a matrix (size x size), entry by entry."""
    matrix = torch.zeros(SIZE, SIZE, dtype=values.dtype)
    if kind == "dense":
        return values
    if kind == "diagonal":
        places = [(i, i) for i in range(SIZE)]
    elif kind == "sparse":
        places = list(zip(ROWS.tolist(), COLUMNS.tolist(), strict=True))
    else:
        places = [(i, i + d) for d in range(-WIDTH, WIDTH + 1) for i in range(SIZE) if 0 <= i + d < SIZE]
    for place, value in zip(places, values, strict=True):
        matrix[place] = value
    return matrix


kinds = pytest.mark.parametrize("kind", SHAPES)
middle_axes = pytest.mark.parametrize("middle", [(), (4,), (2, 3), (0,)])


@kinds
@middle_axes
def test_products(kind, middle):
    values = torch.randn(SHAPES[kind], dtype=torch.float64)
    core, C = build(kind, values), dense(kind, values)
    t = torch.randn(BATCH, *middle, SIZE, dtype=torch.float64)
    torch.testing.assert_close(core.apply(t), t @ C.T)
    torch.testing.assert_close(core.transposed(t), t @ C)


@kinds
@middle_axes
def test_products_with_a_core_for_each_row(kind, middle):
    values = torch.randn(BATCH, *SHAPES[kind], dtype=torch.float64)
    core = build(kind, values)
    t = torch.randn(BATCH, *middle, SIZE, dtype=torch.float64)
    for product, turn in ((core.apply, True), (core.transposed, False)):
        matrices = [dense(kind, v).T if turn else dense(kind, v) for v in values]
        expected = torch.stack([row @ C for row, C in zip(t, matrices, strict=True)])
        torch.testing.assert_close(product(t), expected)


@kinds
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_first_and_second_order(kind, batched, transposed):
    values = torch.randn(*((BATCH,) if batched else ()), *SHAPES[kind], dtype=torch.float64, requires_grad=True)
    t = torch.randn(BATCH, 2, SIZE, dtype=torch.float64, requires_grad=True)

    def run(t, values):
        core = build(kind, values)
        return core.transposed(t) if transposed else core.apply(t)

    assert torch.autograd.gradcheck(run, (t, values))
    assert torch.autograd.gradgradcheck(run, (t, values))


@kinds
def test_mixing_adds_values(kind):
    a, b = (torch.randn(SHAPES[kind], dtype=torch.float64) for _ in range(2))
    mixed = mix([build(kind, a), build(kind, b)], [0.5, -2.0])
    torch.testing.assert_close(mixed.values, 0.5 * a - 2 * b)
    by_row = mix([build(kind, a), build(kind, b)], [torch.tensor([1.0, 0, 2]), torch.tensor([0.0, 1, 3])])
    torch.testing.assert_close(by_row.values, torch.stack([a, b, 2 * a + 3 * b]))
    assert mixed.layout == by_row.layout == build(kind, a).layout


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 9), width=st.integers(0, 12), seed=st.integers(0, 99), dense=st.sampled_from([0, 100]))
def test_a_banded_and_a_sparse_core_of_the_same_entries_agree(size, width, seed, dense):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = band_indices(size, width)
    values = torch.randn(len(rows), generator=generator, dtype=torch.float64)
    t = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
    with patch("spectune.layers.core_ops._DENSE", dense):
        torch.testing.assert_close(banded_product(t, values, width, False), sparse_product(t, values, rows, columns))
        torch.testing.assert_close(banded_product(t, values, width, True), sparse_product(t, values, columns, rows))

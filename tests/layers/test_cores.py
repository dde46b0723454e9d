"""The cores against dense matrices: products, transposes, per-row values, gradients."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.layers.core_ops import (
    band_entries,
    band_indices,
    banded_entries,
    banded_product,
    sparse_entries,
    sparse_product,
)
from spectune.layers.cores import Banded, Dense, Diagonal, Identity, Sparse, mix
from spectune.layers.factors import Factors

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


@kinds
def test_factors_apply_what_their_dense_product_says(kind):
    values = torch.randn(SHAPES[kind], dtype=torch.float64)
    left, right = torch.randn(9, SIZE, dtype=torch.float64), torch.randn(SIZE, 5, dtype=torch.float64)
    factors = Factors(left, right, build(kind, values), 0.3)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(factors.dense(), 0.3 * left @ dense(kind, values) @ right)
    torch.testing.assert_close(factors.apply(x), x @ factors.dense().T)
    plain = Factors(left, right)
    assert plain.core == Identity()
    torch.testing.assert_close(plain.apply(x), x @ (left @ right).T)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 9), width=st.integers(0, 12))
def test_band_indices_are_the_band(size, width):
    rows, columns = band_indices(size, width)
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == {(i, j) for i in range(size) for j in range(size) if abs(i - j) <= width}
    assert len(rows) == band_entries(size, width)
    if width < size:
        assert len(rows) == size * (2 * width + 1) - width * (width + 1)


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


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_are_those_of_the_dense_core_however_many_rows_there_are(rows, dtype, error):
    size, width = 40, 3
    places = band_indices(size, width)
    order = (places[0] * size + places[1]).sort().indices
    values, t = torch.randn(len(order)).to(dtype), torch.randn(rows, size).to(dtype)
    core = torch.zeros(size, size, dtype=torch.float64).index_put(places, values.double())
    to, of = (place[order] for place in places)
    found = {
        "banded": banded_product(t, values, width, False),
        "banded, transposed": banded_product(t, values, width, True),
        "sparse": sparse_product(t, values[order], to, of),
        "sparse, transposed": sparse_product(t, values[order], of, to),
    }
    for name, product in found.items():
        exact = t.double() @ (core if name.endswith("transposed") else core.T)
        assert product.dtype is dtype
        assert (product - exact).abs().max() <= error * exact.abs().max(), name


def test_the_sparse_gradient_is_the_same_however_it_is_taken(monkeypatch):
    grad, t = torch.randn(4, SIZE), torch.randn(4, SIZE)
    for name, value in (("_DENSE", 100), ("_DENSE", 0), ("_CHUNK", 8)):
        monkeypatch.setattr(f"spectune.layers.core_ops.{name}", value)
        torch.testing.assert_close(sparse_entries(grad, t, ROWS, COLUMNS), (grad.T @ t)[ROWS, COLUMNS])


def test_the_banded_products_are_well_formed_operators():
    t, grad = torch.randn(3, SIZE, requires_grad=True), torch.randn(3, SIZE, requires_grad=True)
    values = torch.randn(band_entries(SIZE, WIDTH), requires_grad=True)
    for operator, inputs in ((banded_product, (t, values)), (banded_entries, (grad, t))):
        checks = torch.library.opcheck(operator, (*inputs, WIDTH, False))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dense", [0, 100])
def test_the_sparse_product_is_a_well_formed_operator(dense, monkeypatch):
    monkeypatch.setattr("spectune.layers.core_ops._DENSE", dense)
    t = torch.randn(2, 3, SIZE, requires_grad=True)
    values = torch.randn(len(ROWS), requires_grad=True)
    checks = torch.library.opcheck(sparse_product, (t, values, ROWS, COLUMNS))
    assert set(checks.values()) == {"SUCCESS"}

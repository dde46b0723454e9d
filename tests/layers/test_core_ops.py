"""The products of banded and sparse cores: their entries, their gradients, and that torch knows them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.test_cores import COLUMNS, ROWS, SIZE, WIDTH
from spectune.layers.core_ops import (
    band_entries,
    band_indices,
    banded_entries,
    banded_product,
    sparse_entries,
    sparse_product,
)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 9), width=st.integers(0, 12))
def test_band_indices_are_the_band(size, width):
    rows, columns = band_indices(size, width)
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == {(i, j) for i in range(size) for j in range(size) if abs(i - j) <= width}
    assert len(rows) == band_entries(size, width)
    if width < size:
        assert len(rows) == size * (2 * width + 1) - width * (width + 1)


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


# of the check, in PyTorch 2.15
own_warning = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@own_warning
def test_the_banded_products_are_well_formed_operators():
    t, grad = torch.randn(3, SIZE, requires_grad=True), torch.randn(3, SIZE, requires_grad=True)
    values = torch.randn(band_entries(SIZE, WIDTH), requires_grad=True)
    for operator, inputs in ((banded_product, (t, values)), (banded_entries, (grad, t))):
        checks = torch.library.opcheck(operator, (*inputs, WIDTH, False))
        assert set(checks.values()) == {"SUCCESS"}


@own_warning
@pytest.mark.parametrize("dense", [0, 100])
def test_the_sparse_product_is_a_well_formed_operator(dense, monkeypatch):
    monkeypatch.setattr("spectune.layers.core_ops._DENSE", dense)
    t = torch.randn(2, 3, SIZE, requires_grad=True)
    values = torch.randn(len(ROWS), requires_grad=True)
    checks = torch.library.opcheck(sparse_product, (t, values, ROWS, COLUMNS))
    assert set(checks.values()) == {"SUCCESS"}

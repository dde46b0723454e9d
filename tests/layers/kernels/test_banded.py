"""The kernels of a banded core against float64 and the core as a matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DEVICE, DTYPES, LAYOUTS, check, draw

from spectune.layers.core_ops import band_entries, band_indices

pytest.importorskip("triton", reason="the kernels need Triton")

from spectune.layers.kernels import banded

shapes = given(
    batch=st.sampled_from([None, None, 1, 3]),
    each=st.booleans(),
    n=st.integers(0, 40),
    size=st.integers(1, 150),
    width=st.sampled_from([0, 1, 2, 5, 9, 20]),
    dtype=DTYPES,
    layout=LAYOUTS,
    transpose=st.booleans(),
)
fuzzed = settings(deadline=None, max_examples=25, derandomize=True)


def matrix(values, size, width):
    rows, columns = band_indices(size, width)
    C = torch.zeros(*values.shape[:-1], size, size, dtype=torch.float64, device=DEVICE)
    C[..., rows.to(DEVICE), columns.to(DEVICE)] = values.double()
    return C


@fuzzed
@shapes
def test_product(batch, each, n, size, width, dtype, layout, transpose):
    t = draw((n, size) if batch is None else (batch, n, size), dtype, layout)
    of_batch = batch if each and batch is not None else 1
    values = draw((of_batch, band_entries(size, width)), dtype, seed=1)
    values = values if each and batch is not None else values[0]
    C = matrix(values, size, width)
    C = C if transpose else C.mT
    check(banded.product(t, values, width, transpose), t.double() @ C, t.double().abs() @ C.abs(), dtype)


@fuzzed
@shapes
def test_entries(batch, each, n, size, width, dtype, layout, transpose):
    shape = (n, size) if batch is None else (batch, n, size)
    grad, t = draw(shape, dtype, layout), draw(shape, dtype, "plain" if each else layout, 1)
    rows, columns = (s.to(DEVICE) for s in band_indices(size, width))
    g64, t64 = (t.double(), grad.double()) if transpose else (grad.double(), t.double())
    exact, magnitude = (f(g64).mT @ f(t64) for f in (lambda s: s, torch.abs))
    ours = banded.entries(grad, t, width, transpose, len(rows))
    assert ours.dtype == dtype
    check(ours, exact[..., rows, columns], magnitude[..., rows, columns], dtype)


def test_entries_of_many_rows_in_parts():
    grad, t = draw((301, 12), torch.float32), draw((301, 12), torch.float32, seed=1)
    rows, columns = (s.to(DEVICE) for s in band_indices(12, 2))
    exact, magnitude = grad.double().mT @ t.double(), grad.double().abs().mT @ t.double().abs()
    ours = banded.entries(grad, t, 2, False, len(rows))
    check(ours, exact[rows, columns], magnitude[rows, columns], torch.float32)

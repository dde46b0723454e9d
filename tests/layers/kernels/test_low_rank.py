"""The kernels of low rank against float64, whatever the shape, the dtype and the strides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, LAYOUTS, check, draw

from spectune.layers.cores import Diagonal

pytest.importorskip("triton", reason="the kernels need Triton")

from spectune.layers.kernels import low_rank

ROWS = st.integers(0, 140)
SIDE = st.integers(1, 150)
RANK = st.sampled_from([1, 3, 8, 16, 20, 32])
fuzzed = settings(deadline=None, max_examples=12, derandomize=True)


@fuzzed
@given(n=ROWS, size=SIDE, rank=RANK, dtype=DTYPES, factor=DTYPES, layout=LAYOUTS, of_R=LAYOUTS)
@pytest.mark.parametrize("core", ["identity", "diagonal", "diagonal of each row"])
def test_project(core, n, size, rank, dtype, factor, layout, of_R):
    x, R = draw((n, size), dtype, layout), draw((rank, size), factor, of_R, 1)
    values = draw((n, rank), torch.float32, seed=2) if core == "diagonal of each row" else None
    if core == "diagonal":
        values = draw((1, rank), torch.float32, seed=2)[0]
    t, u = low_rank.project(x, R, None if values is None else Diagonal(values), 0.7)
    exact, magnitude = (0.7 * f(x.double()) @ f(R.to(dtype).double()).mT for f in (lambda s: s, torch.abs))
    check(t, exact, magnitude, dtype)
    if values is not None:
        check(u, exact * values.double(), magnitude * values.double().abs(), dtype)
    assert t.dtype == u.dtype == dtype


@fuzzed
@given(n=ROWS, size=SIDE, rank=RANK, dtype=DTYPES, factor=DTYPES, of_u=LAYOUTS, of_L=LAYOUTS)
@pytest.mark.parametrize(("ratio", "bias"), [(False, False), (True, False), (True, True)])
def test_add(ratio, bias, n, size, rank, dtype, factor, of_u, of_L):
    u, L = draw((n, rank), dtype, of_u), draw((size, rank), factor, of_L, 1)
    y = draw((n, size), dtype, "transposed" if of_u == "transposed" else "plain", 2)
    m, b = (draw((1, size), torch.float32, seed=seed)[0] if given else None for given, seed in ((ratio, 3), (bias, 4)))
    m64, b64 = (torch.tensor(default) if s is None else s.double() for s, default in ((m, 1.0), (b, 0.0)))
    exact, magnitude = (
        f(m64) * (f(y.double()) + 1.3 * f(u.double()) @ f(L.to(dtype).double()).mT) + f(b64)
        for f in (lambda s: s, torch.abs)
    )
    assert low_rank.add(y, u, L, 1.3, m, b) is y
    check(y, exact, magnitude, dtype)


@fuzzed
@given(n=ROWS, wide=SIDE, rank=RANK, dtype=DTYPES, of_a=LAYOUTS, of_b=LAYOUTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_over_rows(swapped, n, wide, rank, dtype, of_a, of_b):
    a, b = draw((n, wide), dtype, of_a), draw((n, rank), dtype, of_b, 1)
    if swapped:
        a, b = b, a
    ours = low_rank.over_rows(a, b, 0.3)
    assert ours.dtype == torch.float32
    check(ours, 0.3 * a.double().mT @ b.double(), 0.3 * a.double().abs().mT @ b.double().abs(), torch.float32)


def test_over_many_rows_in_parts():
    a, b = draw((1100, 70), torch.float32), draw((1100, 3), torch.float32, seed=1)
    check(low_rank.over_rows(a, b), a.double().mT @ b.double(), a.double().abs().mT @ b.double().abs(), torch.float32)
    _, to_ratio = low_rank.through_ratio(a, a, None, torch.ones(70, device=a.device))
    check(to_ratio, (a.double() ** 2).sum(0), (a.double() ** 2).sum(0), torch.float32)


@fuzzed
@given(n=ROWS, size=SIDE, dtype=DTYPES, of_grad=LAYOUTS, of_y=LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_through_ratio(bias, n, size, dtype, of_grad, of_y):
    grad, y = draw((n, size), dtype, of_grad), draw((n, size), dtype, of_y, 1)
    ratio = draw((1, size), torch.float32, seed=2)[0].abs() + 0.5
    b = draw((1, size), dtype, seed=3)[0] if bias else None
    before, to_ratio = low_rank.through_ratio(grad, y, b, ratio)
    g64, y64 = grad.double(), y.double() - (0 if b is None else b.double())
    check(before, g64 * ratio.double(), (g64 * ratio.double()).abs(), dtype)
    magnitude = (g64.abs() * (y64.abs() + (0 if b is None else b.double().abs()))).sum(0) / ratio.double()
    check(to_ratio, (g64 * y64).sum(0) / ratio.double(), magnitude, torch.float32)
    alone, nothing = low_rank.through_ratio(grad, None, b, ratio)
    assert nothing is None
    check(alone, g64 * ratio.double(), (g64 * ratio.double()).abs(), dtype)

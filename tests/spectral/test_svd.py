"""Every decomposition against LAPACK's in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import LARGE, ORDINARY, orthonormal, weight_like, with_spectrum

from spectune.errors import SpectuneError
from spectune.spectral import certificate, one_sided, singular_values, svd
from spectune.speed.dense import float32_is_exact


def reference(W):
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U, S, Vh


def check_orthonormal(rows, atol=5e-6):
    rows = rows.double()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=atol)


def check_signs(Vh):
    assert bool((Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("name", ORDINARY)
def test_full(name):
    W = ORDINARY[name]()
    U, S, Vh = svd(W)
    k = min(W.shape)
    assert (U.shape, S.shape, Vh.shape) == ((W.shape[0], k), (k,), (k, W.shape[1]))
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    largest = float(reference(W)[1][0])
    torch.testing.assert_close(S.double(), reference(W)[1], rtol=0, atol=1e-6 * largest + 2e-45)
    torch.testing.assert_close((U.double() * S.double()) @ Vh.double(), W.double(), rtol=0, atol=2e-6 * largest + 2e-45)
    check_orthonormal(U.mT)
    check_orthonormal(Vh)
    check_signs(Vh)
    assert bool((S.diff() <= 0).all())


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("name", ORDINARY)
def test_parts_of_small_matrices_are_parts_of_the_full_one(name, which):
    W = ORDINARY[name]()
    k = min(W.shape)
    S = reference(W)[1]
    for rank in {1, -(-k // 2), k}:
        part = S[:rank] if which == "top" else S[k - rank :]
        found = svd(W, rank, which)
        torch.testing.assert_close(found.S.double(), part, rtol=0, atol=1e-6 * float(S[0]) + 2e-45)
        check_orthonormal(found.U.mT)
        check_orthonormal(found.Vh)
        check_signs(found.Vh)
        assert certificate(W, found, which).met() != "neither"


@pytest.mark.parametrize("rank", [1, 12, 30])
@pytest.mark.parametrize("name", LARGE)
def test_top_span(name, rank):
    W = LARGE[name]()
    _, S, _ = reference(W)
    found = svd(W, rank, "top")
    check_orthonormal(found.Vh)
    check_orthonormal(found.U.mT)
    check_signs(found.Vh)
    Wd, V = W.double(), found.Vh.double().mT
    best = float(S[:rank].square().sum())
    rest = float(S[rank:].square().sum())
    assert best - float((Wd @ V).square().sum()) <= 2e-4 * min(rest, best) + 1e-6 * best  # an estimate
    torch.testing.assert_close(found.S.double(), S[:rank], rtol=0, atol=5e-3 * float(S[0]))


@pytest.mark.parametrize("name", LARGE)
def test_top_residual(name):
    W = LARGE[name]()
    S = reference(W)[1]
    found = svd(W, 8, "top", certify="residual")
    torch.testing.assert_close(found.S.double(), S[:8], rtol=0, atol=1e-6 * float(S[0]))
    assert certificate(W, found).met() in ("residual", "rounding")


@pytest.mark.parametrize("certify", ["span", "residual"])
@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("name", LARGE)
def test_bottom(name, rank, certify):
    W = LARGE[name]()
    S = reference(W)[1]
    found = svd(W, rank, "bottom", certify=certify)
    check_orthonormal(found.Vh)
    check_orthonormal(found.U.mT)
    check_signs(found.Vh)
    least = S[-rank:]
    inside = float((W.double() @ found.Vh.double().mT).square().sum())
    floor = rank * (2e-6 * float(S[0])) ** 2
    assert inside <= (1 + 1e-3) * float(least.square().sum()) + floor
    torch.testing.assert_close(found.S.double(), least, rtol=0, atol=2e-2 * float(least[0]) + 2e-6 * float(S[0]))
    if certify == "residual":
        assert certificate(W, found, "bottom").met() in ("residual", "rounding")


@pytest.mark.parametrize("name", ORDINARY)
def test_one_sided(name):
    W = ORDINARY[name]()
    L, R, S = one_sided(W)
    largest = float(reference(W)[1][0])
    tall = W.shape[0] >= W.shape[1]
    check_orthonormal(R if tall else L.mT)
    torch.testing.assert_close(L.double() @ R.double(), W.double(), rtol=0, atol=2e-6 * largest + 2e-45)
    torch.testing.assert_close(S.double(), reference(W)[1], rtol=0, atol=1e-6 * largest + 2e-45)
    lengths = torch.linalg.vector_norm(L.double(), dim=0) if tall else torch.linalg.vector_norm(R.double(), dim=1)
    torch.testing.assert_close(lengths, S.double(), rtol=1e-5, atol=1e-6 * largest + 2e-45)


@pytest.mark.parametrize("shape", [(120, 50), (50, 120)])
def test_one_sided_is_the_full_decomposition_without_one_side(shape):
    W = weight_like(*shape)
    U, S, Vh = svd(W)
    L, R, _ = one_sided(W)
    z = torch.rand(50)
    torch.testing.assert_close((L * z) @ R, (U * (S * z)) @ Vh, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["full", "top", "bottom"])
def test_float64_stays_float64(which):
    W = weight_like(300, 280).double() + 1e-9 * torch.randn(300, 280, dtype=torch.float64)
    found = svd(W, None if which == "full" else 5, which, tol=1e-9, certify="residual")
    assert found.U.dtype == torch.float64
    part = {"full": slice(None), "top": slice(0, 5), "bottom": slice(-5, None)}[which]
    torch.testing.assert_close(found.S, reference(W)[1][part], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised(dtype):
    W = weight_like(100, 60).to(dtype)
    torch.testing.assert_close(svd(W).S, svd(W.float()).S, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    scale=st.floats(-20, 20),
)
def test_any_shape_rank_and_scale(m, n, rank, seed, scale):
    k = min(m, n)
    rank = min(rank, k)
    S = torch.rand(rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(descending=True)[0]
    W = with_spectrum(m, n, S * 10**scale, seed)
    U, found, Vh = svd(W)
    largest = 10**scale
    torch.testing.assert_close(found[:rank].double(), S * largest, rtol=0, atol=1e-6 * largest)
    torch.testing.assert_close((U * found) @ Vh, W, rtol=0, atol=2e-6 * largest)
    check_orthonormal(U.mT)
    check_orthonormal(Vh)


def test_the_same_whatever_the_random_state_and_leaves_it_alone():
    W = weight_like(400, 400)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = svd(W, 8, "top")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    for a, b in zip(first, svd(W, 8, "top"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_thread_counts_differ_by_rounding(which):
    W = weight_like(600, 400)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(svd(W, 8, which))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_a_perturbation_by_rounding_moves_separated_triplets_by_rounding():
    W = with_spectrum(500, 400, torch.cat([torch.linspace(9, 5, 8), torch.linspace(2, 1, 392)]))
    a, b = svd(W, 8, "top"), svd(W * (1 + 1e-7), 8, "top")
    torch.testing.assert_close(a.Vh, b.Vh, rtol=0, atol=2e-5)


def test_low_matmul_precision_and_autocast_do_not_reach_the_decomposition():
    W = weight_like(400, 400)
    expected = svd(W, 8, "top")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = svd(W, 8, "top")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("library", ["mkldnn", "cuda"])
def test_a_precision_set_for_one_library_does_not_reach_the_decomposition(library):
    chosen = getattr(getattr(torch.backends, library), "matmul", None)
    if not hasattr(chosen, "fp32_precision"):
        pytest.skip("this PyTorch has one setting for all")
    W = weight_like(400, 400)
    expected = svd(W, 8, "top")
    before = chosen.fp32_precision
    chosen.fp32_precision = "tf32"
    try:
        assert not float32_is_exact()
        found = svd(W, 8, "top")
        assert chosen.fp32_precision == "tf32"
    finally:
        chosen.fp32_precision = before
    assert float32_is_exact()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_weight_that_requires_grad_and_is_not_contiguous():
    W = torch.nn.Parameter(weight_like(60, 100)).T[::2]
    found = svd(W, 3, "top")
    assert not found.U.requires_grad
    assert found.U.is_contiguous()
    torch.testing.assert_close(found.S.double(), reference(W.detach())[1][:3], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.zeros(3), {}, "not a matrix"),
        (torch.zeros(0, 3), {}, "not a matrix"),
        (torch.zeros(3, 3, dtype=torch.int8), {}, "packed or quantized"),
        (torch.zeros(3, 3, dtype=torch.float8_e4m3fn), {}, "packed or quantized"),
        (torch.zeros(3, 3, device="meta"), {}, "meta device"),
        (torch.full((3, 3), float("nan")), {}, "not finite"),
        (torch.tensor([[1.0, float("inf")]]), {}, "not finite"),
        (torch.tensor([[1.0, -float("inf")]]), {}, "not finite"),
        (torch.eye(3), {"rank": 4, "which": "top"}, r"rank 4 is above min\(out, in\) = 3"),
        (torch.eye(3), {"which": "top"}, "rank must be an integer"),
        (torch.eye(3), {"rank": 0, "which": "bottom"}, "rank must be an integer"),
        (torch.eye(3), {"rank": 2}, "which='full' returns all 3"),
        (torch.eye(3), {"which": "middle"}, "which must be"),
        (torch.eye(3), {"rank": 1, "which": "top", "tol": -1.0}, "tol must be"),
        (torch.eye(3), {"rank": 1, "which": "top", "certify": "hope"}, "certify must be"),
    ],
)
def test_bad_input_is_named(weight, arguments, message):
    with pytest.raises(SpectuneError, match=message):
        svd(weight, **arguments)


def test_zero_tolerance_is_exact():
    W = weight_like(400, 300)
    for which, part in (("top", slice(0, 5)), ("bottom", slice(295, 300))):
        found, full = svd(W, 5, which, tol=0), svd(W)
        assert torch.equal(found.S, full.S[part])
        assert torch.equal(found.Vh, full.Vh[part])


@pytest.mark.parametrize(("rank", "which"), [(1, "bottom"), (2, "bottom"), (3, "bottom"), (3, "top"), (4, "top")])
@pytest.mark.parametrize("size", [(7, 4), (300, 260)])
def test_vectors_of_singular_values_of_zero_are_orthonormal(size, rank, which):
    W = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    W[:, 0] = 0
    W[:, 2] = 0
    U, S, Vh = svd(W, rank, which)
    for side in (U.mT, Vh):
        assert torch.allclose(side @ side.mT, torch.eye(rank), atol=1e-5)
    values = torch.linalg.svdvals(W)
    wanted = values[:rank] if which == "top" else values[-rank:]
    assert torch.allclose(S, wanted, rtol=5e-3, atol=1e-4)


def test_equal_singular_values_span_their_space():
    V = orthonormal(300, 6)
    W = (torch.eye(300, dtype=torch.float64) + 4 * V @ V.mT).float()
    found = svd(W, 6, "top").Vh.double()
    torch.testing.assert_close(found.mT @ found, V @ V.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ORDINARY)
def test_values_alone_are_those_of_the_full_decomposition(case):
    W = ORDINARY[case]()
    S, exact = singular_values(W), torch.linalg.svdvals(W.double())
    assert S.dtype == torch.float64
    assert (S - exact).abs().max() <= 3e-8 * exact[0]  # the root of what the Gram matrix rounds to


def test_values_of_a_16_bit_weight_that_a_function_reads():
    W = ORDINARY["wide"]().bfloat16()
    assert torch.equal(singular_values(lambda: W), singular_values(W.float()))
    with pytest.raises(SpectuneError, match="not finite"):
        singular_values(torch.full((2, 2), torch.nan))

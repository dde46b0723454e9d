"""The ends of a spectrum against LAPACK's in float64, and the inverse that the lower one comes from."""

import pytest
import torch

from spectune.spectral._partial import SMALLEST_PIVOT, bottom, exact, factor, rounding, top

DOUBLE = torch.float64


def tall(m, k, values=None, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(m, k, generator=generator, dtype=DOUBLE)
    if values is not None:
        U, _, Vh = torch.linalg.svd(T, full_matrices=False)
        T = U @ torch.diag(values) @ Vh
    return T.to(dtype)


@pytest.mark.parametrize(("m", "k"), [(50, 50), (70, 50)])
def test_the_inverse_is_that_of_a_factor_with_t_s_singular_values(m, k):
    T = tall(m, k)
    A, X = factor(T), tall(6, k, seed=1)
    once = A.backward(A.forward(X))
    torch.testing.assert_close(once @ (T.mT @ T), X, rtol=1e-7, atol=1e-7)  # X A^-1 A^-T = X (T^T T)^-1
    # the left vectors of A, lifted, are T's: orthonormal, and U^T T = S V^T with the same values
    square = A.forward(torch.eye(k, dtype=DOUBLE)).inverse()  # A
    U, S, Vh = torch.linalg.svd(square)
    lifted = A.lift(U.mT)
    torch.testing.assert_close(lifted @ lifted.mT, torch.eye(k, dtype=DOUBLE), rtol=0, atol=1e-9)
    torch.testing.assert_close(lifted @ T, S[:, None] * Vh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "k"), [(30, 30), (40, 30)])
def test_a_weight_that_lost_its_rank_has_finite_products(m, k):
    T = tall(m, k)
    T[:, 3] = T[:, 5]
    X = tall(4, k, seed=1)
    A = factor(T)
    made = A.backward(A.forward(X))
    assert bool(made.isfinite().all())
    assert float(made.abs().max()) > 1 / SMALLEST_PIVOT  # the raised pivot is what it is divided by


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("certify", ["span", "triplets"])
@pytest.mark.parametrize(("m", "k", "rank"), [(40, 24, 5), (600, 480, 8), (480, 480, 8)])
def test_both_ends_are_lapacks(m, k, rank, certify, dtype):
    T = tall(m, k, torch.logspace(1, -2, k, dtype=DOUBLE), dtype=dtype)
    values = torch.linalg.svdvals(T.double())
    for end, expected in ((top, values[:rank]), (bottom, values[-rank:])):
        U, S, V = (part.double() for part in end(T, rank, 1e-4, certify, 0))
        torch.testing.assert_close(S, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(V @ V.mT, torch.eye(rank, dtype=DOUBLE), rtol=0, atol=1e-4)
        residual = torch.linalg.vector_norm(U @ T.double() - S[:, None] * V, dim=1)
        assert bool((residual <= 0.11 * S).all())


def test_the_span_leaves_hardly_more_than_the_best_one_does():
    tol, rank = 1e-2, 8
    T = tall(700, 500)  # values of noise, nearly equal where they are cut
    _, _, V = top(T, rank, tol, "span", 0)
    values = torch.linalg.svdvals(T)
    least = float(values[rank:].square().sum().sqrt())
    left = float(torch.linalg.matrix_norm(T - T @ V.mT @ V))
    assert least <= left <= least * (1 + tol / 2)


@pytest.mark.parametrize("rank", [1, 3])
def test_zeros_have_orthonormal_vectors_too(rank):
    for end in (top, bottom):
        U, S, V = (part.double() for part in end(torch.zeros(9, 6), rank, 1e-4, "span", 0))
        assert not S.any()
        for part in (U, V):
            torch.testing.assert_close(part @ part.mT, torch.eye(rank, dtype=DOUBLE), rtol=0, atol=1e-5)


def test_a_part_is_in_descending_order_and_rounding_grows_with_the_weight():
    T = tall(12, 7)
    U, S, V = exact(T, slice(2, 5))
    torch.testing.assert_close(S, torch.linalg.svdvals(T)[2:5])
    torch.testing.assert_close(U @ T, S[:, None] * V)
    assert rounding(T * 4) == pytest.approx(4 * rounding(T))
    assert rounding(torch.zeros(3, 3)) > 0

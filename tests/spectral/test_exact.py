"""Decompositions from the Gram matrix against LAPACK's of the whole matrix in float64, in pieces and without."""

import pytest
import torch

from spectune.spectral import _exact
from spectune.spectral._exact import eigen, gram_part, minus_gram, tall_svd, times


def tall(S, rows=40, dtype=torch.float32, seed=0):
    """Return a matrix (rows x k) with these singular values, up to its dtype."""
    S = torch.as_tensor(S, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(rows, len(S), dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(len(S), len(S), dtype=torch.float64, generator=generator))[0]
    return (U * S @ V.mT).to(dtype)


@pytest.fixture(params=["whole", "a few rows at a time"])
def pieces(request, monkeypatch):
    if request.param != "whole":
        monkeypatch.setattr(_exact, "CHUNK", 50)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_gram_matrix_is_summed_in_float64_in_its_lower_triangle(pieces, k):
    T = tall(torch.linspace(1, 2, k))
    found, expected = minus_gram(T), -(T.double().mT @ T.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.tril(), expected.tril(), rtol=1e-13, atol=1e-13)


def test_products_are_in_float64(pieces):
    T, V = tall([3.0, 2.0, 1.0]), torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(times(T, V), T.double() @ V, rtol=1e-14, atol=1e-14)


def test_eigenpairs_are_singular_values_and_right_vectors(pieces):
    T = tall([5.0, 3.0, 2.0, 0.5])
    S, V = eigen(T)
    torch.testing.assert_close(S, torch.linalg.svdvals(T.double()), rtol=1e-12, atol=0)
    torch.testing.assert_close(V.mT @ V, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((T.double() @ V).norm(dim=0), S, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "S",
    [
        [1.0],
        [5.0, 3.0, 2.0, 0.5],
        [4.0, 4.0, 4.0],
        [3.0, 1.0, 1e-5, 1e-6],
        [2.0, 1.0, 0.0, 0.0],
        [0.0, 0.0],
        [7.0, 0.0],
    ],
)
def test_a_whole_decomposition_whatever_the_spectrum(pieces, S, dtype):
    T = tall(S, dtype=dtype)
    U, found, V = tall_svd(T)
    assert (U.dtype, found.dtype, V.dtype) == (dtype, torch.float64, torch.float64)
    eye = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.svdvals(T.double()), rtol=1e-7, atol=1e-9)
    assert (found.diff() <= 0).all()
    torch.testing.assert_close(V.mT @ V, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(U.double().mT @ U.double(), eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(U.double() * found @ V.mT, T.double(), rtol=0, atol=1e-6 * max(S))


def test_left_vectors_of_zeros_are_the_same_each_time():
    T = tall([2.0, 0.0, 0.0])
    assert all(torch.equal(a, b) for a, b in zip(tall_svd(T), tall_svd(T.clone()), strict=True))


def test_a_square_matrix():
    T = tall([3.0, 2.0, 1e-6], rows=3)
    U, S, V = tall_svd(T)
    torch.testing.assert_close(U.double() * S @ V.mT, T.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(U.double().mT @ U.double(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4)])
def test_part_of_the_triplets_in_the_matrix_own_dtype(part):
    T = tall([8.0, 6.0, 5.0, 4.0], dtype=torch.float32)
    V, TV = gram_part(T, part)
    assert (tuple(V.shape), tuple(TV.shape), V.dtype) == ((2, 4), (2, 40), torch.float32)
    torch.testing.assert_close(TV, V @ T.mT, rtol=1e-4, atol=1e-4)
    exact = torch.linalg.svd(T.double(), full_matrices=False)[2][part]
    torch.testing.assert_close((V.double() @ exact.mT).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5)

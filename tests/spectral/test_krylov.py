"""The Krylov iteration by itself: its triplets, when it ends, and that it gives up rather than be wrong."""

import numpy as np
import pytest
import torch

from spectune.spectral._krylov import block_krylov, block_size, polish, start, to_come, worthwhile


def matrix(values, m=300, n=200):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64))[0] for size in (m, n))
    return (U * values) @ V.mT


def triplets(A, rank, measure=None):
    return block_krylov(lambda X: X @ A.mT, lambda Y: Y @ A, tuple(A.shape), rank, 1e-8, measure, A, 0)


def test_dominant_triplets_are_lapacks():
    A = matrix(torch.logspace(0, -6, 200, dtype=torch.float64))
    right, left = polish(*triplets(A, 5))
    _, S, Vh = torch.linalg.svd(A)
    torch.testing.assert_close(torch.linalg.vector_norm(left, dim=1), S[:5], rtol=1e-8, atol=0)
    torch.testing.assert_close((right @ Vh[:5].mT).abs(), torch.eye(5, dtype=A.dtype), rtol=0, atol=1e-6)


def test_a_matrix_of_low_rank_runs_dry_and_is_complete():
    A = matrix(torch.ones(6, dtype=torch.float64))
    right, left = triplets(A, 6)
    torch.testing.assert_close(left.mT @ right, A, rtol=0, atol=1e-9)


def test_what_does_not_settle_is_given_up():
    assert triplets(matrix(torch.linspace(1, 1.0001, 200, dtype=torch.float64)), 5) is None


def test_gains_that_fall_geometrically_are_summed():
    gains = np.cumsum([0.0, 8.0, 4.0])
    assert to_come(list(zip(range(3), gains, strict=True))) == pytest.approx(4.0, rel=0.5)
    assert to_come([(0, 0.0), (1, 1.0), (2, 1.0)]) == 0.0


def test_blocks_are_of_eights_and_worthwhile_only_where_they_are_small():
    assert [block_size(rank) for rank in (1, 8, 9, 100)] == [8, 8, 16, 32]
    assert worthwhile(8, 4096)
    assert not worthwhile(256, 512)


def test_the_first_block_is_drawn_alike_everywhere():
    first = start(8, 20, 3)
    torch.testing.assert_close(first @ first.mT, torch.eye(8, dtype=first.dtype))
    assert torch.equal(first, start(8, 20, 3))
    assert not torch.equal(first, start(8, 20, 4))

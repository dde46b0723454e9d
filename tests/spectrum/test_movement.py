"""What an update did to a spectrum, on matrices whose vectors are known."""

import numpy as np
import pytest
import torch

from spectune.spectrum.movement import PARTS, movement


def orthonormal(n, k, seed):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).double())[0]


M, N, K = 60, 40, 40
U, V = orthonormal(M, K, 1), orthonormal(N, K, 2)
S = torch.linspace(10, 1, K).double()
W = (U * S @ V.mT).float()


def test_scaling_the_top_moves_the_top_and_makes_nothing_new():
    dW = (U[:, :4] * (0.5 * S[:4]) @ V[:, :4].mT).float()
    found = movement(W, dW)
    assert found.intruders == 0
    assert found.relative_norm == pytest.approx(0.5 * float(S[:4].norm() / S.norm()), rel=1e-4)
    assert (found.update_rank, found.overlap_rank) == (4, 4)
    assert found.top_overlap == pytest.approx(1, abs=1e-5)
    assert found.bottom_overlap == pytest.approx(0, abs=1e-5)
    assert found.chance == pytest.approx((4 / M + 4 / N) / 2)
    assert found.shift[0] == pytest.approx(0.5, rel=1e-4)
    assert np.abs(found.shift[1:]).max() < 1e-4
    np.testing.assert_allclose(found.after[:4], 1.5 * S[:4], rtol=1e-5)


def test_an_update_of_the_bottom_overlaps_the_bottom():
    dW = (U[:, -3:] * 0.01 @ V[:, -3:].mT).float()
    found = movement(W, dW)
    assert found.bottom_overlap == pytest.approx(1, abs=1e-4)
    assert found.top_overlap == pytest.approx(0, abs=1e-4)
    assert found.shift[-1] > 0
    assert len(found.shift) == PARTS


def test_large_directions_from_outside_are_intruders():
    outside = torch.linalg.qr(torch.cat([U, torch.randn(M, 2).double()], 1))[0][:, -2:]  # orthogonal to all of U
    dW = (outside * torch.tensor([40.0, 30.0]).double() @ orthonormal(N, 2, 5).mT).float()
    found = movement(W, dW, top=10)
    assert found.intruder_places == [1, 2]
    assert found.intruders == 2
    assert movement(W, dW, top=1).intruders == 1
    assert movement(W, 1e-3 * dW).intruders == 0


def test_epsilon_is_the_cosine():
    u = (0.8 * U[:, 0] + 0.6 * torch.linalg.qr(torch.cat([U, torch.randn(M, 1).double()], 1))[0][:, -1])[:, None]
    dW = (1e5 * u @ V[:, :1].mT).float()
    assert movement(W, dW, top=1, epsilon=0.79).intruders == 0
    assert movement(W, dW, top=1, epsilon=0.81).intruders == 1


def test_no_update():
    found = movement(W, torch.zeros_like(W))
    assert (found.relative_norm, found.update_rank, found.intruders) == (0, 0, 0)
    assert (found.top_overlap, found.bottom_overlap, found.chance) == (None, None, None)
    assert np.abs(found.shift).max() < 1e-6

"""Certificates say what an exact SVD in float64 says."""

from __future__ import annotations

import pytest
import torch
from spectra import LARGE, ORDINARY, weight_like, with_spectrum

from spectune.spectral import SVD, certificate, svd


@pytest.mark.parametrize("name", ORDINARY)
def test_of_a_full_decomposition(name):
    W = ORDINARY[name]()
    found = certificate(W, svd(W))
    assert found.met() in ("residual", "rounding")
    assert found.orthogonality < 1e-6
    assert found.error < 1e-6 or name == "denormal"
    assert found.excess == 0


@pytest.mark.parametrize("rank", [5, 30, 200])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(640, 640), (1024, 512), (512, 1024)])
def test_of_a_top(shape, tol, rank):
    W = weight_like(*shape)
    found = svd(W, rank, "top", tol)
    S = torch.linalg.svdvals(W.double())
    U, s, Vh = (t.double() for t in found)
    told = certificate(W, found)
    Wd = W.double()
    right = torch.linalg.vector_norm(Wd @ Vh.mT - U * s, dim=0)
    left = torch.linalg.vector_norm(Wd.mT @ U - Vh.mT * s, dim=0)
    torch.testing.assert_close(told.residuals, torch.maximum(right, left), rtol=1e-6, atol=1e-12)
    assert told.residual == pytest.approx(float((torch.maximum(right, left) / s).max()), rel=1e-6)
    assert told.error == pytest.approx(float((Wd - U * s @ Vh).norm() / Wd.norm()), rel=1e-5)
    V = Vh.mT if shape[0] >= shape[1] else U
    T = Wd if shape[0] >= shape[1] else Wd.mT
    least = float(S[rank:].square().sum())
    excess = (float((T - T @ V @ V.mT).square().sum()) - least) / min(least, float(S[:rank].square().sum()))
    assert told.excess == pytest.approx(excess, rel=0.25, abs=2e-6)
    assert excess <= tol
    assert told.met(tol) != "neither"


@pytest.mark.parametrize("rank", [5, 30])
@pytest.mark.parametrize("name", ["weight, square", "weight, tall", "weight, wide", "white noise"])
def test_of_a_bottom(name, rank):
    W = LARGE[name]()
    found = svd(W, rank, "bottom", tol=1e-2)
    S = torch.linalg.svdvals(W.double())[-rank:]
    told = certificate(W, found, "bottom")
    V = found.Vh.double().mT if W.shape[0] >= W.shape[1] else found.U.double()
    T = W.double() if W.shape[0] >= W.shape[1] else W.double().mT
    excess = float((T @ torch.linalg.qr(V)[0]).square().sum()) / float(S.square().sum()) - 1
    assert told.excess == pytest.approx(excess, rel=0.5, abs=2e-4)
    assert told.met(1e-2) != "neither"


def test_a_wrong_decomposition_is_found_out():
    W = weight_like(300, 200)
    U, S, Vh = svd(W, 10, "top")
    assert certificate(W, SVD(U, S, Vh)).met() != "neither"
    assert certificate(W, SVD(U.roll(1, 1), S, Vh)).residual > 0.1
    assert certificate(W, SVD(U * 1.01, S, Vh)).orthogonality > 0.01
    lower = svd(W)
    beyond = SVD(lower.U[:, 5:15].contiguous(), lower.S[5:15], lower.Vh[5:15])
    told = certificate(W, beyond)
    assert told.met() == "residual"  # they are triplets, though not the top ones
    assert told.excess > 0.1


def test_separated_triplets_meet_the_residual():
    W = with_spectrum(500, 400, torch.cat([torch.linspace(9, 5, 8), torch.linspace(2, 1, 392)]))
    assert certificate(W, svd(W, 8, "top", certify="residual")).met() == "residual"

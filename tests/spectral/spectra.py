"""Matrices with chosen spectra."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    """Return k orthonormal columns of length n in float64."""
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a matrix (m x n) with the singular values S."""
    k = len(S)
    return ((orthonormal(m, k, seed) * S.double()) @ orthonormal(n, k, seed + 1).mT).to(dtype)


def weight_like(m: int, n: int, seed: int = 0) -> Tensor:
    """Return a power-law head on a Marchenko-Pastur bulk, as trained weights have."""
    head = min(m, n) // 16
    bulk = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / math.sqrt(max(m, n))
    return bulk + with_spectrum(m, n, 12 * torch.arange(1, head + 1).double() ** -0.6, seed)


ORDINARY = {
    "tall": lambda: weight_like(320, 96),
    "wide": lambda: weight_like(96, 320),
    "square": lambda: weight_like(160, 160),
    "1 x n": lambda: torch.randn(1, 50),
    "n x 1": lambda: torch.randn(50, 1),
    "1 x 1": lambda: torch.tensor([[-3.0]]),
    "rank one": lambda: torch.outer(torch.arange(1.0, 41.0), torch.arange(-10.0, 20.0)),
    "rank three": lambda: with_spectrum(80, 60, torch.tensor([5.0, 2.0, 1.0])),
    "zero": lambda: torch.zeros(30, 20),
    "zero row and column": lambda: torch.nn.functional.pad(torch.randn(20, 20), (0, 3, 0, 3)),
    "orthogonal": lambda: orthonormal(64, 64).float(),
    "identity": lambda: torch.eye(40),
    "clusters": lambda: with_spectrum(90, 70, torch.tensor([3.0] * 20 + [1.0] * 30 + [0.5] * 20)),
    "ill-conditioned": lambda: with_spectrum(70, 70, torch.logspace(0, -12, 70)),
    "denormal": lambda: torch.randn(40, 30) * 1e-42,
    "tiny": lambda: torch.randn(40, 30) * 1e-30,
    "huge": lambda: torch.randn(40, 30) * 1e30,
    "one huge entry": lambda: torch.randn(40, 30).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(1e8)),
}

LARGE = {  # where the Krylov iterations are at work
    "weight, square": lambda: weight_like(640, 640),
    "weight, tall": lambda: weight_like(1024, 512),
    "weight, wide": lambda: weight_like(512, 1024),
    "white noise": lambda: torch.randn(600, 600, generator=torch.Generator().manual_seed(3)),
    "rank five": lambda: with_spectrum(600, 480, torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5])),
    "rank forty": lambda: with_spectrum(500, 500, torch.linspace(5, 1, 40)),
    "clusters": lambda: with_spectrum(512, 400, torch.cat([torch.full((10,), 9.0), torch.full((390,), 2.0)])),
    "orthogonal": lambda: orthonormal(400, 400).float(),
    "ill-conditioned": lambda: with_spectrum(480, 480, torch.logspace(0, -12, 480)),
    "nearly singular": lambda: with_spectrum(480, 480, torch.cat([torch.linspace(3, 1, 476), torch.full((4,), 1e-9)])),
    "singular tall": lambda: torch.cat([weight_like(800, 400), torch.zeros(800, 3)], 1),
    "scaled down": lambda: weight_like(400, 400) * 1e-35,
}

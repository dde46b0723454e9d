"""What a method makes of one weight by itself, without a model."""

import torch
from torch import Tensor

from spectune.layers.factors import Factors
from spectune.methods.base import Method
from spectune.spectral import decompose_many


def weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, dtype=torch.float64, generator=generator)


def start_of(method: Method, W: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the frozen tensors and the trained ones at the start, all in float64."""
    request = method.request()
    frozen = {} if request is None else dict(method.basis(W, decompose_many({"W": W}, request, cache=False)["W"]))
    trained = method.initial(method.shapes(*W.shape), frozen)
    return ({k: v if v.dtype is torch.int64 else v.double() for k, v in frozen.items()}, to_double(trained))


def assert_projections(method: Method, W: Tensor) -> None:
    """Assert that g and h are what W, and R^T, make of the basis: W R^T = L diag(g) and R R^T = diag(h)."""
    frozen, t = start_of(method, W)
    f = method.factors({**frozen, **t})
    g, h = method.projections({**frozen, **t})
    torch.testing.assert_close(W @ f.right.mT, f.left * g)
    torch.testing.assert_close(f.right @ f.right.mT, torch.diag(h))


def to_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.double() for key, tensor in tensors.items()}


def dense(factors: Factors) -> Tensor:
    """Return s L C R of factors: the core's product with the unit vectors is C^T."""
    size = factors.right.shape[0]
    core = factors.core.apply(torch.eye(size, dtype=torch.float64)).mT
    return factors.scale * factors.left @ core @ factors.right

"""Small random sketches: of a base weight, to know it again, and of an update, to know that it is reproduced."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from spectune.errors import SpectuneError

PROBES = 4


@lru_cache(maxsize=64)
def probes(size: int, salt: int) -> Tensor:
    """Return (PROBES x size) normal numbers, the same on every machine and in every version."""
    drawn = np.random.RandomState(size + salt).standard_normal((PROBES, size)) / size**0.5
    return torch.from_numpy(drawn.astype(np.float32))


def sketch(right_product: Tensor) -> Tensor:
    """Return P_out M P_in^T (PROBES x PROBES), given M P_in^T transposed, as (PROBES x out)."""
    product = right_product.detach().float().cpu()
    return probes(product.shape[-1], 1) @ product.mT


def sketch_weight(weight: Tensor) -> Tensor:
    """Return the sketch of a weight W (out x in): PROBES x PROBES numbers that a changed weight changes."""
    rows = probes(weight.shape[1], 0).to(weight.device, weight.dtype)
    return sketch(rows.float() @ weight.float().mT if weight.dtype != torch.float32 else rows @ weight.mT)


def agrees(ours: Tensor, stored: Tensor, tolerance: float) -> bool:
    """Whether two sketches are equal up to a relative tolerance in the Frobenius norm."""
    difference = torch.linalg.vector_norm(ours.double() - stored.double())
    return bool(difference <= tolerance * torch.linalg.vector_norm(stored.double()) + 1e-12)


def check_base(name: str, weight: Tensor, expected: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise unless a weight (out x in) has the shape and the sketch that an adapter's layer was trained on.

    A sketch of a weight in 16 bits differs from that in 32 by about 2^-9, another fine-tune by more.
    """
    if tuple(weight.shape) != tuple(shape):
        raise SpectuneError(
            f"the adapter belongs to another base: {name!r} is {tuple(weight.shape)} here and {tuple(shape)} there"
        )
    if expected is not None and not agrees(sketch_weight(weight), expected, 1e-2):
        raise SpectuneError(f"the adapter belongs to another base: the weight of {name!r} differs from the one it was trained on")

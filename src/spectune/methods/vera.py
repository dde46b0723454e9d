"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from spectune.layers.cores import Diagonal
from spectune.layers.factors import Factors
from spectune.methods.base import Method, Shapes, Tensors, check_int, check_range
from spectune.methods.registry import register


@register
@dataclass(frozen=True)
class VeRA(Method):
    """Scale the rows of two frozen random matrices: W' = W + diag(b) B diag(d) A.

    A (rank x in) and B (out x rank) are kaiming-uniform, drawn from `seed` and the same on every machine; layers of
    one shape share them, in memory too.  Only b (out), from zero, and d (rank) train.

    Args:
        rank: rows of A and columns of B; may be above min(out, in).
        d_initial: every entry of d at the start.
        seed: of the random matrices, which are not stored.
        dropout: probability of dropping an input of the branch in training.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "arXiv:2310.11454"
    summary: ClassVar[str] = "W + diag(b) B diag(d) A with B, A random and shared; b and d train"
    learning_rate: ClassVar[float] = 1e-2
    basis_fields: ClassVar[tuple[str, ...]] = ("rank", "seed")

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "rank")
        check_int(self, "seed", least=0)
        check_range(self, "seed", 0, 2**32)
        check_range(self, "d_initial", 0, open_low=True)
        check_range(self, "dropout", 0, 1)

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"b": (out_features,), "d": (self.rank,)}

    def basis(self, weight: Tensor, decomposition: None) -> dict[str, Tensor]:
        A, B = _random(self.seed, self.rank, *weight.shape, weight.device)
        return {"A": A, "B": B}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {"b": torch.zeros(shapes["b"]), "d": torch.full(shapes["d"], self.d_initial)}

    def factors(self, t: Tensors) -> Factors:
        return Factors(t["b"][:, None] * t["B"], t["A"], Diagonal(t["d"]))


@lru_cache(maxsize=8)
def _random(seed: int, rank: int, out_features: int, in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A (rank x into) and B (out x rank), uniform with variance 2 / fan-in."""
    if device.type == "meta":
        return torch.empty(rank, in_features, device=device), torch.empty(out_features, rank, device=device)
    draw = np.random.RandomState(seed).uniform
    A, B = (draw(-1, 1, shape) * (6 / shape[1]) ** 0.5 for shape in ((rank, in_features), (out_features, rank)))
    return torch.from_numpy(A).to(device, torch.float32), torch.from_numpy(B).to(device, torch.float32)

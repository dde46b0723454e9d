"""LoRA: low-rank adaptation (arXiv 2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectune.layers.cores import IDENTITY
from spectune.layers.factors import Factors
from spectune.methods.base import Method, Shapes, Tensors, check_bool, check_int, check_range
from spectune.methods.registry import register


@register
@dataclass(frozen=True)
class LoRA(Method):
    """Add a product of two thin matrices: W' = W + s B A, s = alpha / rank.

    A starts kaiming-uniform (a = sqrt 5) and B at zero, so W' = W at the start.

    Args:
        rank: columns of B (out x rank) and rows of A (rank x in).
        alpha: numerator of the scale.
        rslora: s = alpha / sqrt(rank) (arXiv 2312.03732).
        dropout: probability of dropping an input of the branch in training.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"
    summary: ClassVar[str] = "W + s B A; B and A train"
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 8
    alpha: float = 16
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "rank")
        check_bool(self, "rslora")
        check_range(self, "alpha", 0, open_low=True)
        check_range(self, "dropout", 0, 1)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"A": (self.rank, in_features), "B": (out_features, self.rank)}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(shapes["A"][1])  # kaiming_uniform with a = sqrt 5
        return {"A": torch.empty(shapes["A"]).uniform_(-bound, bound), "B": torch.zeros(shapes["B"])}

    def initial_of_table(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        # as PEFT: what no batch holds keeps its row
        return {"A": torch.zeros(shapes["A"]), "B": torch.randn(shapes["B"])}

    def factors(self, t: Tensors) -> Factors:
        return Factors(t["B"], t["A"], IDENTITY, self.scale)

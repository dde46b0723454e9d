"""LoRA-XS: a trained r x r matrix between frozen singular vectors (arXiv 2405.17604)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectune.layers.cores import Dense
from spectune.layers.factors import Factors
from spectune.methods.base import Method, Shapes, Tensors, at_most, check_int, check_range
from spectune.methods.registry import register
from spectune.spectral import SVD, Request


@register
@dataclass(frozen=True)
class LoRAXS(Method):
    """Train only the core between the top singular vectors: W' = W + s U_r R (S_r V_r^T), s = alpha / rank.

    R (rank x rank) starts at N(0, 1e-5), the standard deviation of the authors' code.

    Args:
        rank: singular triplets of the basis, all of a weight that has fewer, at the same s; rank^2 parameters train.
        alpha: numerator of the scale; None is `rank`, so that s = 1.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "lora_xs"
    paper: ClassVar[str] = "arXiv:2405.17604"
    summary: ClassVar[str] = "W + s U R (S V^T) from the largest triplets; R (r x r) trains"
    learning_rate: ClassVar[float] = 4e-3
    basis_fields: ClassVar[tuple[str, ...]] = ("rank",)
    core_only: ClassVar[bool] = True
    learns_from_zero: ClassVar[bool] = False

    rank: int = 64
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_int(self, "rank")
        if self.alpha is not None:
            check_range(self, "alpha", 0, open_low=True)

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fit(self, out_features: int, in_features: int) -> LoRAXS:
        return at_most(self, min(out_features, in_features))

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"R": (self.rank, self.rank)}

    def request(self) -> Request:
        return Request("top", self.rank)

    def basis(self, weight: Tensor, decomposition: SVD) -> dict[str, Tensor]:
        U, S, Vh = decomposition
        return {"U": U, "S": S, "SVh": S[:, None] * Vh}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {"R": torch.randn(shapes["R"]) * 1e-5}

    def factors(self, t: Tensors) -> Factors:
        return Factors(t["U"], t["SVh"], Dense(t["R"]), self.scale)

    def projections(self, t: Tensors) -> tuple[Tensor, Tensor]:
        return t["S"] ** 2, t["S"] ** 2

    def coefficients(self, t: Tensors) -> dict[str, Tensor]:
        return {"R": self.scale * t["R"]}

    def from_coefficients(self, coefficients: Tensors) -> tuple[Method, dict[str, Tensor]]:
        return LoRAXS(self.rank), dict(coefficients)

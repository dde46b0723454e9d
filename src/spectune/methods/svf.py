"""SVF: singular value fine-tuning, of Transformer-squared (arXiv 2501.06252)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectune.layers.cores import Diagonal
from spectune.layers.factors import Factors
from spectune.methods.base import Method, Shapes, Tensors, check_choice, check_range
from spectune.methods.registry import register
from spectune.spectral import SVD, Request


@register
@dataclass(frozen=True)
class SVF(Method):
    """Scale every singular value: W' = U diag(S * z) V^T, so W' - W = U S diag(z - 1) V^T.

    `parametrization="plain"` trains z itself, from one.  `"sigmoid"` is the authors' code: with m = max_mult *
    sigmoid(p) and p = 0.1 + 0.01 randn at the start, z = m * sum(S) / sum(S * m); the overall scale is redundant
    and W' is close to W, not equal, at the start.

    Args:
        parametrization: "plain" or "sigmoid".
        max_mult: the sigmoid parametrization's largest multiple (the rescaling cancels it).

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "svf"
    paper: ClassVar[str] = "arXiv:2501.06252"
    summary: ClassVar[str] = "U diag(S z) V^T over the whole spectrum; z trains"
    learning_rate: ClassVar[float] = 2e-2
    core_only: ClassVar[bool] = True
    learns_from_zero: ClassVar[bool] = False

    parametrization: str = "plain"
    max_mult: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self, "parametrization", ("plain", "sigmoid"))
        check_range(self, "max_mult", 0, open_low=True)

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"z" if self.parametrization == "plain" else "p": (min(out_features, in_features),)}

    def request(self) -> Request:
        return Request("one_sided")

    def basis(self, weight: Tensor, decomposition: SVD) -> dict[str, Tensor]:
        L, R, S = decomposition
        return {"L": L, "R": R, "S": S}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        if self.parametrization == "plain":
            return {"z": torch.ones(shapes["z"])}
        return {"p": 0.1 + 0.01 * torch.randn(shapes["p"])}

    def factors(self, t: Tensors) -> Factors:
        return Factors(t["L"], t["R"], Diagonal(self._multiples(t) - 1))

    def whole(self, t: Tensors) -> Factors:
        return Factors(t["L"], t["R"], Diagonal(self._multiples(t)))

    def still(self, t: Tensors) -> Tensors:
        return {**t, **({"z": torch.ones_like(t["z"])} if "z" in t else {"p": torch.zeros_like(t["p"])})}

    def _multiples(self, t: Tensors) -> Tensor:
        if self.parametrization == "plain":
            return t["z"]
        m, S = self.max_mult * torch.sigmoid(t["p"]), t["S"].to(t["p"].dtype)
        return m * (S.sum() / (S * m).sum())

    def projections(self, t: Tensors) -> tuple[Tensor, Tensor]:
        # W = L R: where the rows of R are orthonormal W R^T = L; where they are S V^T, W R^T = L S^2
        h = torch.ones_like(t["S"]) if t["L"].shape[0] >= t["R"].shape[1] else t["S"] ** 2
        return h, h

    def coefficients(self, t: Tensors) -> dict[str, Tensor] | None:
        if self.parametrization == "sigmoid" and "S" not in t:
            return None  # the rescaling needs the spectrum
        return {"z": self._multiples(t) - 1}

    def from_coefficients(self, coefficients: Tensors) -> tuple[Method, dict[str, Tensor]]:
        return SVF(), {"z": 1 + coefficients["z"]}

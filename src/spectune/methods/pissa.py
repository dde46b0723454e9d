"""PiSSA: principal singular values and vectors adaptation (arXiv 2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spectune.layers.cores import IDENTITY
from spectune.layers.factors import Factors, add_product, project, taken
from spectune.methods.base import Method, Shapes, Tensors, at_most, check_int, check_range
from spectune.methods.registry import register
from spectune.spectral import SVD, Request


@register
@dataclass(frozen=True)
class PiSSA(Method):
    """Train the top of the spectrum: W' = W + s (B A - B0 A0), s = alpha / rank.

    B0 = U_r sqrt(S_r / s) and A0 = sqrt(S_r / s) V_r^T come from the `rank` largest singular triplets.  W itself is
    left alone.  What trains and is stored is dB = B - B0 and dA = A - A0, from zero: the same gradients and, without
    weight decay, the same course as training B and A, an update that is exactly zero at the start in every dtype,

        W' - W = s [dB, B0] [A0 + dA; dA],

    and weight decay, where there is any, that pulls towards W and not towards W without its principal part.

    Args:
        rank: singular triplets taken; all of a weight that has fewer, at the same s.
        alpha: numerator of the scale; None is `rank`, so that s = 1.
        dropout: probability of dropping an input of the branch in training.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "pissa"
    paper: ClassVar[str] = "arXiv:2404.02948"
    summary: ClassVar[str] = "W + s (B A - B0 A0) from the largest triplets; B and A train"
    learning_rate: ClassVar[float] = 2e-4
    basis_fields: ClassVar[tuple[str, ...]] = ("rank", "scale")
    which: ClassVar[Literal["top", "bottom"]] = "top"
    learns_from_zero: ClassVar[bool] = False

    rank: int = 128
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "rank")
        if self.alpha is not None:
            check_range(self, "alpha", 0, open_low=True)
        check_range(self, "dropout", 0, 1)

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fit(self, out_features: int, in_features: int) -> PiSSA:
        return at_most(self, min(out_features, in_features))

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"dA": (self.rank, in_features), "dB": (out_features, self.rank)}

    def request(self) -> Request:
        return Request(self.which, self.rank)

    def basis(self, weight: Tensor, decomposition: SVD) -> dict[str, Tensor]:
        U, S, Vh = decomposition
        root = (S / self.scale).sqrt()
        return {"A0": root[:, None] * Vh, "B0": U * root}

    def spectrum(self, t: Tensors) -> Tensor:
        return self.scale * t["A0"].square().sum(1)

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def factors(self, t: Tensors) -> Factors:
        left = torch.cat([t["dB"], t["B0"]], dim=1)
        right = torch.cat([t["A0"] + t["dA"], t["dA"]], dim=0)
        return Factors(left, right, IDENTITY, self.scale)

    def add(self, t: Tensors, x: Tensor, y: Tensor) -> None:
        # (dB + B0) dA + dB A0, with nothing joined that would be copied for each token
        x = taken(x, t["dA"])
        z, z0 = project(x, t["dA"]), project(x, t["A0"])
        add_product(y, z0.add_(z), t["dB"], self.scale)
        add_product(y, z, t["B0"], self.scale)

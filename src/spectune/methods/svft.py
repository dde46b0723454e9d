"""SVFT: singular vectors guided fine-tuning (arXiv 2405.19597)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from spectune.layers.core_ops import band_entries
from spectune.layers.cores import Banded, Diagonal, Sparse
from spectune.layers.factors import Factors
from spectune.methods.base import Method, Shapes, Tensors, check_bool, check_choice, check_int, check_range
from spectune.methods.registry import register
from spectune.spectral import SVD, Request


@register
@dataclass(frozen=True)
class SVFT(Method):
    """Train a sparse matrix between the singular vectors: W' = U (S + M) V^T.

    M is zero at the start, as in the paper.  With k = min(out, in), its entries are the diagonal ("plain"), all
    |i - j| <= width ("banded"), as many as that band drawn without repeats ("random"), or as many where |u_i . v_j|
    is largest ("top_k").  u_i and v_j have different lengths unless W is square; the shorter is then taken as
    padded with zeros, so the product runs over their first k coordinates.

    Args:
        pattern: "plain", "banded", "random" or "top_k".
        width: the band's reach on either side of the diagonal; sets the number of entries of the last three.
        gate: the authors' code: M = sigmoid(g) m with a trained scalar g from 0 and m of the deviation
            sqrt(2 / entries), kaiming-normal over all of them, so that the model is changed at the start.
        seed: of the random pattern, which is not stored.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "svft"
    paper: ClassVar[str] = "arXiv:2405.19597"
    summary: ClassVar[str] = "U (S + M) V^T; M's entries train: plain, banded, random or top_k"
    core_only: ClassVar[bool] = True

    pattern: str = "plain"
    width: int = 8
    gate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "pattern", ("plain", "banded", "random", "top_k"))
        check_int(self, "width", "seed", least=0)
        check_range(self, "seed", 0, 2**32)
        check_bool(self, "gate")

    @property
    def basis_fields(self) -> tuple[str, ...]:
        indexed = {"random": ("pattern", "width", "seed"), "top_k": ("pattern", "width")}
        return indexed.get(self.pattern, ())

    @property
    def learning_rate(self) -> float:
        """The paper's for the pattern."""
        return {"plain": 5e-2, "banded": 5e-3, "top_k": 5e-3, "random": 1e-3}[self.pattern]

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        k = min(out_features, in_features)
        entries = k if self.pattern == "plain" else band_entries(k, self.width)
        return {"M": (entries,), **({"g": (1,)} if self.gate else {})}

    def request(self) -> Request:
        return Request("full")

    def basis(self, weight: Tensor, decomposition: SVD) -> dict[str, Tensor]:
        U, S, Vh = decomposition
        k = len(S)
        frozen = {"U": U, "Vh": Vh, "S": S}
        if self.pattern in ("random", "top_k"):
            count = band_entries(k, self.width)
            if U.is_meta:
                flat = torch.empty(count, dtype=torch.int64, device="meta")
            elif self.pattern == "random":
                flat = _drawn(self.seed, k, count).to(U.device)
            else:
                flat = (U[:k].mT @ Vh[:, :k].mT).abs().flatten().topk(count).indices
            flat = flat.sort().values
            frozen |= {"rows": flat // k, "columns": flat % k}
        return frozen

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        if not self.gate:
            return {"M": torch.zeros(shapes["M"])}
        return {"M": torch.randn(shapes["M"]) * (2 / shapes["M"][0]) ** 0.5, "g": torch.zeros(1)}

    def factors(self, t: Tensors) -> Factors:
        return Factors(t["U"], t["Vh"], self._core(t))

    def _core(self, t: Tensors) -> Diagonal | Banded | Sparse:
        values, k = self._values(t), len(t["S"])
        if self.pattern == "plain":
            return Diagonal(values)
        if self.pattern == "banded":
            return Banded(values, k, self.width)
        return Sparse(values, t["rows"], t["columns"], k)

    def whole(self, t: Tensors) -> Factors:
        return Factors(t["U"], t["Vh"], self._core(t).plus(t["S"]))

    def still(self, t: Tensors) -> Tensors:
        return {**t, "M": torch.zeros_like(t["M"])}

    def _values(self, t: Tensors) -> Tensor:
        return torch.sigmoid(t["g"]) * t["M"] if self.gate else t["M"]

    def projections(self, t: Tensors) -> tuple[Tensor, Tensor]:
        return t["S"], torch.ones_like(t["S"])

    def coefficients(self, t: Tensors) -> dict[str, Tensor]:
        return {"M": self._values(t)}

    def from_coefficients(self, coefficients: Tensors) -> tuple[Method, dict[str, Tensor]]:
        return SVFT(self.pattern, self.width, False, self.seed), dict(coefficients)


@lru_cache(maxsize=8)
def _drawn(seed: int, k: int, count: int) -> Tensor:
    """Return `count` different places in a k x k matrix; a model has few k and asks for each of its layers."""
    return torch.from_numpy(np.random.RandomState(seed).permutation(k * k)[:count].copy())

"""The bias of a layer, trained beside an update of its weight or alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectune.layers.factors import Base, Factors
from spectune.methods.base import Method, Shapes, Tensors
from spectune.methods.registry import register


@register(listed=False)
@dataclass(frozen=True)
class Bias(Method):
    """Train a layer's bias and leave its weight: W' = W and b' = b + d, where d starts at zero.

    In PEFT's files such biases are those of `bias="lora_only"` and `"all"`, and of `lora_bias`.
    """

    name: ClassVar[str] = "bias"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "d, added to a layer's bias"
    learning_rate: ClassVar[float] = 1e-3
    additive: ClassVar[bool] = False
    in_factors: ClassVar[bool] = False

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"d": (out_features,)}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {key: torch.zeros(shape) for key, shape in shapes.items()}

    def factors(self, t: Tensors) -> Factors:
        raise TypeError("a bias is no update of W")

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        return t["d"].to(x.dtype).expand(*x.shape[:-1], -1)

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        return torch.zeros(len(t["d"]), weight.shape[-1] if weight.dim() == 2 else 0)

    def bias_of(self, t: Tensors, own: Tensor | None) -> Tensor | None:
        return t["d"] if own is None else own + t["d"]

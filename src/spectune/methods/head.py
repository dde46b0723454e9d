"""A layer that an adapter brings whole: the head of a task that the base was not made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.layers.factors import Base, Factors
from spectune.methods.base import Method, Shapes, Tensors, check_bool
from spectune.methods.registry import register

_SPREAD = 0.02  # of transformers' new layers


@register(listed=False)
@dataclass(frozen=True)
class Head(Method):
    """Train a layer in full: W' = H and b' = h, whatever the base has there.

    H and h start as the layer is, or normal with standard deviation 0.02 and at zero where W is zero.  In PEFT's
    files such a layer is one of its `modules_to_save`.

    Args:
        bias: h trains too; otherwise the layer keeps the bias that it has.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "head"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "H, trained in full, for a layer that the base has not learned"
    learning_rate: ClassVar[float] = 1e-2
    additive: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    in_factors: ClassVar[bool] = False

    bias: bool = True

    def __post_init__(self) -> None:
        check_bool(self, "bias")

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"H": (out_features, in_features), **({"h": (out_features,)} if self.bias else {})}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {key: torch.randn(shape) * (_SPREAD if key == "H" else 0.0) for key, shape in shapes.items()}

    def whole_layer(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        h = weight.new_zeros(len(weight)) if bias is None else bias
        return {"H": weight, **({"h": h} if self.bias else {})}

    def factors(self, t: Tensors) -> Factors:
        raise TypeError("a head replaces W and is no update of it in factors")

    def replacement(self, t: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
        H, h = t["H"], t["h"] if self.bias else bias
        return F.linear(x.to(H.dtype), H, None if h is None else h.to(H.dtype)).to(x.dtype)

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        output = base.output() if base.bias is None else base.output() + base.bias.to(x.dtype)
        return self.replacement(t, x, base.bias) - output

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        return t["H"] - weight

    def bias_of(self, t: Tensors, own: Tensor | None) -> Tensor | None:
        return t.get("h")

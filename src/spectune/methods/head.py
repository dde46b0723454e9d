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

    H starts normal with standard deviation 0.02 and h at zero.  In PEFT's files such a layer is one of its
    `modules_to_save`.

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

    bias: bool = True

    def __post_init__(self) -> None:
        check_bool(self, "bias")

    def shapes(self, out: int, into: int) -> Shapes:
        return {"H": (out, into), **({"h": (out,)} if self.bias else {})}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {key: torch.randn(shape) * (_SPREAD if key == "H" else 0.0) for key, shape in shapes.items()}

    def factors(self, t: Tensors) -> Factors:
        raise TypeError("a head replaces W and is no update of it in factors")

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        output = base.output()
        answer = F.linear(x.to(t["H"].dtype), t["H"], t.get("h")).to(output.dtype)
        kept = base.bias if self.bias else None
        return answer - output if kept is None else answer - output - kept.to(output.dtype)

    def answer(self, t: Tensors, x: Tensor, y: Tensor, base: Base, training: bool) -> Tensor:
        bias = t["h"] if self.bias else base.bias
        weight = t["H"]
        bias = None if bias is None else bias.to(weight.dtype)
        return F.linear(x.reshape(-1, x.shape[-1]).to(weight.dtype), weight, bias).to(y.dtype)

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        return t["H"] - weight

    def bias_of(self, t: Tensors) -> Tensor | None:
        return t.get("h")

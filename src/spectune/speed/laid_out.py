"""Linear layers of a model that answers, their weights laid out once as the processor multiplies by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TypeGuard

import torch
import torch.nn as nn
from torch import Tensor

from spectune.speed.dense import PackedWeight
from spectune.speed.forwards import exchanged_forwards


class _Forward:
    """Takes the place of a linear layer's forward method, and lays its weight out when it is first called.

    A weight that another one took the place of, or that was written to, is multiplied by as it is.
    """

    def __init__(self, module: nn.Module, weight: nn.Parameter) -> None:
        self._module, self._weight, self._version = module, weight, weight._version
        self._packed: PackedWeight | None = None

    def __call__(self, input: Tensor) -> Tensor:
        if self._is_as_it_was():
            if self._packed is None:
                self._packed = PackedWeight(self._weight.detach())
            y = self._packed.linear(input, self._module._parameters.get("bias"))
            if y is not None:
                return y
        return type(self._module).forward(self._module, input)

    def __reduce__(self) -> tuple[object, ...]:  # a copy of the layer is not laid out
        return MethodType, (nn.Linear.forward, self._module)

    def _is_as_it_was(self) -> bool:
        module, weight = self._module, self._weight
        if type(module) is not nn.Linear or module._parameters.get("weight") is not weight:
            return False
        if weight._version != self._version or torch.compiler.is_compiling():
            return False
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters(recurse=False)))


def _takes(module: nn.Module) -> TypeGuard[nn.Linear]:
    weight = module._parameters.get("weight") if type(module) is nn.Linear else None
    if type(weight) is not nn.Parameter or weight.is_inference() or "forward" in vars(module):
        return False
    return PackedWeight.takes(weight.detach())


@contextmanager
def laid_out(model: nn.Module, room: float = math.inf) -> Iterator[None]:
    """Within the context a model's plain linear layers, its head among them, answer few rows in half of the time.

    What is called takes its memory once more.  Adapted layers, layers of other classes and what someone replaced stay
    as they are; gradients, autocast and compiled code go by the layers themselves.

    Args:
        model: the model.
        room: bytes that are free; nothing is laid out where all layers would take more than half of them.
    """
    weights = {module: module.get_parameter("weight") for module in model.modules() if _takes(module)}
    if 2 * sum(weight.nbytes for weight in weights.values()) > room:
        weights = {}
    with exchanged_forwards({module: _Forward(module, weight) for module, weight in weights.items()}):
        yield

"""Linear layers of a model that answers, their weights laid out once as the processor multiplies by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from types import MethodType
from typing import TypeGuard

import torch
import torch.nn as nn
from torch import Tensor

from spectune.speed.dense import PackedWeight, one_row_pays
from spectune.speed.forwards import exchanged_forwards


class LaidWeight:
    """A layer's weight, laid out when it is first multiplied by.

    One that another took the place of, or that was written to, is left to the layer.

    Args:
        weight: W (out x in), which `PackedWeight.takes`.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight, self._version = weight, weight._version
        self._packed: PackedWeight | None = None
        self._calls = 0

    def holds(self, weight: Tensor | None) -> bool:
        """Whether this is the weight, as it was."""
        return weight is self._weight and self._weight._version == self._version

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Return x W^T + bias, given what the layer has for a weight now; None where the layer is to answer."""
        if weight is None or not self.holds(weight) or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        if self._packed is None:
            self._calls += x.numel() > x.shape[-1]
            # where only several rows gain by it, a prompt's pass alone is no reason to lay W out
            if self._calls < 2 and not one_row_pays(self._weight.dtype):
                return None
            # not by its own `detach`, which counts who has its memory where it is watched
            self._packed = PackedWeight(Tensor.detach(self._weight))
        return self._packed.linear(x, bias)

    def __reduce__(self) -> tuple[object, ...]:  # a copy of a layer is not laid out
        return type(None), ()


class LaysOut:
    """Mixed into a linear layer's class whose forward method asks `laid` for W x + b first, where it is there."""

    laid: LaidWeight | None = None

    @property
    def may_be_laid_out(self) -> bool:
        """Whether W x + b is what its class answers, by a weight that it holds as it is."""
        raise NotImplementedError


class _Forward:
    """Takes the place of a plain linear layer's forward method."""

    def __init__(self, module: nn.Linear, laid: LaidWeight) -> None:
        self._module, self._laid = module, laid

    def __call__(self, input: Tensor) -> Tensor:
        module = self._module
        if type(module) is nn.Linear:  # and no adapter came
            held = module._parameters
            y = self._laid.linear(input, held.get("weight"), held.get("bias"))
            if y is not None:
                return y
        return type(module).forward(module, input)

    def __reduce__(self) -> tuple[object, ...]:
        return MethodType, (nn.Linear.forward, self._module)


def _weight_of(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of a layer that can be laid out."""
    if isinstance(module, LaysOut):
        if module.laid is not None or not module.may_be_laid_out:  # by a context around this one
            return None
    elif not _is_plain(module):
        return None
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or weight.is_inference():
        return None
    return weight if PackedWeight.takes(Tensor.detach(weight)) else None


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    held = module._parameters.get("weight") if type(module) is nn.Linear else None
    return type(held) is nn.Parameter and "forward" not in vars(module)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Give the layers that can be laid out, and their weights."""
    seen: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if (weight := _weight_of(module)) is not None:
            yield module, weight
        if not isinstance(module, LaysOut):  # whose adapters may be many
            waiting += module.children()


def bytes_to_lay_out(model: nn.Module) -> int:
    """Return the bytes that a model's linear layers take once more when all of them are laid out."""
    return sum({id(weight): weight.nbytes for _, weight in _linears(model)}.values())


@contextmanager
def laid_out(
    model: nn.Module, room: float = math.inf, known: MutableMapping[int, LaidWeight] | None = None
) -> Iterator[None]:
    """Within the context a model's linear layers, its head among them, answer few rows in less time.

    What is called takes its memory once more.  Layers of other classes and what someone replaced stay as they are;
    gradients, autocast and compiled code go by the layers themselves.

    Args:
        model: the model.
        room: bytes that are free; nothing is laid out where all layers would take more than half of them.
        known: keeps what is laid out for the next context.
    """
    found = dict(_linears(model))
    if 2 * sum(weight.nbytes for weight in found.values()) > room:
        found = {}
    before, now = known or {}, dict[int, LaidWeight]()
    for weight in found.values():
        laid = before.get(id(weight))
        now[id(weight)] = LaidWeight(weight) if laid is None or not laid.holds(weight) else laid
    if known is not None:
        known.clear()
        known.update(now)
    laid_of = {module: now[id(weight)] for module, weight in found.items()}
    adapted = {module: laid for module, laid in laid_of.items() if isinstance(module, LaysOut)}
    plain: dict[nn.Module, _Forward] = {
        module: _Forward(module, laid) for module, laid in laid_of.items() if _is_plain(module)
    }
    for module, laid in adapted.items():
        module.laid = laid
    try:
        with exchanged_forwards(plain):
            yield
    finally:
        for module, laid in adapted.items():
            if vars(module).get("laid") is laid:
                del module.laid

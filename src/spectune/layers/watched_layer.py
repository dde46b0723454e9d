"""The weight of an adapted layer as other modules see it: whoever multiplies by it itself goes past the adapters."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.layers.frozen import FrozenLayer
from spectune.layers.mixtures import Part, weight_at
from spectune.layers.parts import PartLinear
from spectune.layers.reads import read_outside, reader_of, watched
from spectune.layers.rows import Rows
from spectune.layers.selection import Scope


class WatchedLayer(FrozenLayer):
    """Mixed into a linear layer's class: whoever reads its weight past it, while adapters answer, is told."""

    is_called: bool = False  # a trial of the model saw it called, and not read past
    prepared: tuple[Scope | None, list[Part]]  # what the model was last set to, and what that is in this layer
    forward_code: CodeType  # of the forward method that asks for W itself

    def parts(self, scope: Scope) -> list[Part]:
        """Return the updates that answer in this layer, where all rows have the same, and their adapters' weights."""
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        """W as the layer holds it; to other modules, in their forward passes, it tells its kind and no values."""
        weight = self._parameters.get("weight")
        if weight is None and isinstance(self, PartLinear):
            weight = self.own_weight()
        elif weight is None:  # a replica's or FSDP's plain tensor, or what a parametrization computes
            weight = vars(self)["weight"] if "weight" in vars(self) else super().weight  # type: ignore[misc]
        if torch.compiler.is_compiling():
            # the layer's own product, where it is a plain one, does not come by here
            if self.is_packed or self.is_called or self.is_own or not isinstance(weight, nn.Parameter):
                return weight
            asked = len(self.prepared[1]) > 0 or self.selection.contexts > 0  # PyTorch 2.9 traces no bool() of a list
            return read_outside(weight, self.adapted_as) if asked and not weight.requires_grad else weight
        # the caller of this property is the class's own forward method as a rule, and its caller that of the adapted
        # layer: then it is the layer itself that multiplies, and nothing else has to be looked at
        frame = sys._getframe(1)
        if frame.f_back is not None and frame.f_back.f_code is self.forward_code:
            return weight
        if not self._asks() or reader_of(self, frame, self.forward_code) is None:
            return weight
        return watched(weight, self.adapted_as)

    @weight.setter
    def weight(self, value: object) -> None:
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del vars(self)["weight"]

    def _asks(self) -> bool:
        """Whether an adapter that is in use has a part in this layer, in some row."""
        choice = (scope := self.selection.scope()).choice
        if not isinstance(choice, Rows):
            return bool(self.parts(scope))
        # the first row answers, as a rule: all rows times all adapters are too many for every layer and token
        return any(
            isinstance(weight := weight_at(mixture, name, self), Tensor) or bool(weight)
            for mixture in choice.mixtures
            for name in mixture
            if name in self.adapters
        )

    def is_asked(self) -> bool:
        """Whether an adapter may have a part in the layer's answer."""
        scope = self.selection.scope()
        return isinstance(scope.choice, Rows) or bool(scope.aside) or bool(self.parts(scope))

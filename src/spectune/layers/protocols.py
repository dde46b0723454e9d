"""What the parts of the adapted layer know of each other, so that none has to import another."""

from __future__ import annotations

from typing import Protocol

import torch.nn as nn
from torch import Tensor

from spectune.layers.factors import Base
from spectune.layers.updates import Update


class Place(Protocol):
    """What adapters have a part in, a layer or another module, as mixtures and rows see it."""

    adapters: nn.ModuleDict

    def __hash__(self) -> int: ...


class Layer(Place, Protocol):
    """An adapted layer, as sums of updates, row weights and stacks of factors see it."""

    bases: nn.ModuleDict
    bias: nn.Parameter | None
    training: bool

    def tensors(self, update: Update) -> dict[str, Tensor]: ...
    def base(self, output: Tensor | None = None) -> Base: ...

"""What the parts of the adapted layer know of each other and of methods, so that none has to import another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch.nn as nn
from torch import Tensor

from spectune.layers.factors import Base, Factors, Ratio

Tensors = Mapping[str, Tensor]


class Rule(Protocol):
    """A method as the adapted layer sees it: `spectune.methods.Method` says what each of these is."""

    additive: ClassVar[bool]
    replaces: ClassVar[bool]
    in_factors: ClassVar[bool]
    core_only: ClassVar[bool]

    @property
    def drop(self) -> float: ...
    @property
    def basis_key(self) -> str: ...
    def factors(self, t: Tensors) -> Factors: ...
    def whole(self, t: Tensors) -> Factors | None: ...
    def ratio(self, t: Tensors, base: Base) -> Ratio | None: ...
    def ratios(self, ts: Sequence[Tensors], bases: Sequence[Base]) -> Tensor | None: ...
    def still(self, t: Tensors) -> Tensors: ...
    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor: ...
    def add(self, t: Tensors, x: Tensor, y: Tensor) -> None: ...
    def delta(self, t: Tensors, weight: Tensor) -> Tensor: ...
    def bias_of(self, t: Tensors, own: Tensor | None) -> Tensor | None: ...
    def replacement(self, t: Tensors, x: Tensor, bias: Tensor | None) -> Tensor: ...


class Place(Protocol):
    """What adapters have a part in, a layer or another module, as mixtures and rows see it."""

    adapters: nn.ModuleDict

    def __hash__(self) -> int: ...


class Layer(Place, Protocol):
    """An adapted layer, as row weights and stacks of factors see it."""

    bases: nn.ModuleDict
    bias: nn.Parameter | None
    training: bool

    def tensors(self, update: Any) -> dict[str, Tensor]: ...
    def base(self, output: Tensor | None = None) -> Base: ...
    def sum(self, updates: Sequence[tuple[Any, Any]], x: Tensor, plain: Tensor, y: Tensor) -> Tensor: ...

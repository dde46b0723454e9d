"""Updates of one layer: a method with its trained tensors, and the frozen tensors that methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.layers.factors import Base, Ratio
from spectune.layers.protocols import Rule


class Basis(nn.Module):
    """The frozen tensors of a method on one weight, shared by every adapter that has the same basis."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {**self._buffers, **self._parameters}  # type: ignore[dict-item]

    def as_parameters(self) -> None:
        """Hold the matrices as frozen parameters, which FSDP2 shards, and not as buffers, which it does not."""
        for name, tensor in list(self._buffers.items()):
            if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class Update(nn.Module):
    """One term of one adapter on one layer: a method, its trained tensors as parameters, and a weight.

    Args:
        method: what to do with the tensors.
        trained: the tensors that train.
        weight: factor of the whole update; 1 except in a sum of adapters.
    """

    def __init__(self, method: Rule, trained: Mapping[str, Tensor], weight: float = 1.0) -> None:
        super().__init__()
        self.method, self.weight = method, weight
        self._kept: tuple[Any, Ratio | None] | None = None
        self.basis_key = method.basis_key
        for name, tensor in trained.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def ratio(self, tensors: dict[str, Tensor], base: Base) -> Ratio | None:
        """Return the method's ratio; without gradients it is kept until a parameter is written to."""
        trained: list[Any] = list(self._parameters.values())
        if self.method.additive or torch.is_grad_enabled() or any(p.is_inference() for p in trained):
            self._kept = None
            return self.method.ratio(tensors, base)
        state = [(p.data_ptr(), p._version) for p in trained]
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, self.method.ratio(tensors, base)
        return self._kept[1]

    def extra_repr(self) -> str:
        return repr(self.method)

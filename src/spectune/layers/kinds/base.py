"""What a kind of layer says of itself, and its input in the place of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.errors import SpectuneError


class Kind(ABC):
    """Layers whose answer is x W^T + b for vectors x (..., in) that are made of their input, and never laid out.

    Attributes:
        name: in the files of adapters.
        classes: of the layers.
        looks_up: each x is zero but in one place, or in a few, where it is one.
        several: there are several x in each place, each answered by rows of W of its own.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[type[nn.Module], ...]]
    looks_up: ClassVar[bool] = False
    several: ClassVar[bool] = False

    def takes(self, layer: object) -> bool:
        """Whether a layer is of this kind."""
        return isinstance(layer, self.classes)

    @abstractmethod
    def refusal(self, layer: object) -> str | None:
        """Return why a layer's answer is no x W^T + b, as words that follow its class, or None."""

    @abstractmethod
    def matrix(self, held: Tensor) -> Tensor:
        """Return W (out x in) of the tensor that a layer holds."""

    @abstractmethod
    def held(self, matrix: Tensor, kernel: Sequence[int]) -> Tensor:
        """Return the tensor that a layer holds of W (out x in); the inverse of `matrix`."""

    def kernel(self, layer: object) -> tuple[int, ...]:
        """Return the axes that `matrix` has flattened into the last."""
        return ()

    @abstractmethod
    def product(self, layer: object, input: Tensor, matrix: Tensor) -> Tensor:
        """Return x M^T (..., rows) for M (rows x in)."""

    def finish(self, layer: object, t: Tensor, left: Tensor) -> Tensor:
        """Return t L^T (..., out) for L (out x p), where t (..., p) is made of what `product` returns."""
        return F.linear(t, left)

    def of_rows(self, layer: object, input: Tensor, matrix: Tensor, rows: Tensor) -> Tensor:
        """Return x M^T (..., n) for M (n x in) in the place of these rows (n) of W."""
        return self.product(layer, input, matrix)

    def features_last(self, layer: object, answer: Tensor) -> Tensor:
        """Return a layer's answer with the axis of W's rows as the last."""
        return answer

    def as_answered(self, layer: object, y: Tensor) -> Tensor:
        """Return y (..., out) as the layer answers; the inverse of `features_last`."""
        return y

    @abstractmethod
    def dropped(self, input: Tensor, p: float) -> Tensor:
        """Return an input with values dropped with probability p."""


class Vectors:
    """An input of a layer in the place of the vectors x (..., in) that its kind makes of it: it has their products.

    Args:
        kind: the kind.
        layer: the layer.
        input: what it was given.
        shape: of x.
        dtype: of x.
    """

    def __init__(self, kind: Kind, layer: nn.Module, input: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._kind, self._layer, self._input = kind, layer, input
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, input.device

    def product(self, matrix: Tensor) -> Tensor:
        """Return x M^T (..., rows) for M (rows x in)."""
        return self._kind.product(self._layer, self._input, matrix)

    def finish(self, t: Tensor, left: Tensor) -> Tensor:
        """Return t L^T (..., out) for L (out x p), where t (..., p) is made of what `product` returns."""
        return self._kind.finish(self._layer, t, left)

    def of_rows(self, matrix: Tensor, rows: Tensor) -> Tensor:
        """Return x M^T (..., n) for M (n x in) in the place of these rows (n) of W."""
        return self._kind.of_rows(self._layer, self._input, matrix, rows)

    @property
    def input(self) -> Tensor:
        """What the layer was given."""
        return self._input

    def dropped(self, p: float) -> Vectors:
        """Return the vectors of an input with values dropped with probability p."""
        return Vectors(self._kind, self._layer, self._kind.dropped(self._input, p), self.shape, self.dtype)

    def __getitem__(self, rows: Tensor) -> Vectors:
        shape = (len(rows), *self.shape[1:])
        return Vectors(self._kind, self._layer, self._input[rows], shape, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> object:
        # what a method of somebody else's does with x; those here ask `product`
        if func is F.linear:
            given: Mapping[str, Any] = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
            x, bias = given["input"], given.get("bias")
            if isinstance(x, Vectors) and not x._kind.several:
                y = x.product(given["weight"])
                return y if bias is None else y + bias
        name = getattr(func, "__name__", str(func))
        raise SpectuneError(f"a method that takes {name} of its input fits linear layers alone: exclude the others")

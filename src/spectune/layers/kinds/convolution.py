"""Convolutions in one, two or three dimensions: W is (out x in * k), the patches under the kernel are the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from torch import Tensor

from spectune.layers.kinds.base import Kind
from spectune.speed.dropout import dropout


class Convolution(Kind):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d, without groups.

    No patch is laid out: x M^T for M (rows x in * k) is the convolution with M in the shape of a kernel, which reads
    the input once, where the patches would take k times its memory.
    """

    name = "conv"
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def refusal(self, layer: Any) -> str | None:
        if layer.groups > 1:
            return f"in {layer.groups} groups, each with a matrix of its own"
        return None

    def matrix(self, held: Tensor) -> Tensor:
        return held.flatten(1)

    def held(self, matrix: Tensor, kernel: Sequence[int]) -> Tensor:
        return matrix.unflatten(1, (-1, *kernel))

    def kernel(self, layer: Any) -> tuple[int, ...]:
        return tuple(layer.kernel_size)

    def product(self, layer: Any, input: Tensor, matrix: Tensor) -> Tensor:
        kernel = self.held(matrix, layer.kernel_size).to(input.dtype)
        return self.features_last(layer, layer._conv_forward(input, kernel, None))

    def features_last(self, layer: Any, answer: Tensor) -> Tensor:
        return answer.movedim(-1 - len(layer.kernel_size), -1)

    def as_answered(self, layer: Any, y: Tensor) -> Tensor:
        return y.movedim(-1, -1 - len(layer.kernel_size))

    def dropped(self, input: Tensor, p: float) -> Tensor:
        return dropout(input, p)

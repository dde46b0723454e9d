"""Convolutions in one, two or three dimensions: W is (out x in * k), the patches under the kernel are the vectors.

In groups W is (out x in / groups * k), as the layer holds it, and in each place there is a vector for each group, which
the rows of W that are the group's answer. So dW = s L C R has one R for all groups, and keeps to the groups as W does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from spectune.layers.kinds.base import Kind
from spectune.speed.dropout import dropout

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Convolution(Kind):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d, without groups.

    No patch is laid out: x M^T for M (rows x in * k) is the convolution with M in the shape of a kernel, which reads
    the input once, where the patches would take k times its memory.
    """

    name = "conv"
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def takes(self, layer: Conv) -> bool:
        return Kind.takes(self, layer) and layer.groups == 1

    def refusal(self, layer: object) -> str | None:
        return None

    def matrix(self, held: Tensor) -> Tensor:
        return held.flatten(1)

    def held(self, matrix: Tensor, kernel: Sequence[int]) -> Tensor:
        return matrix.unflatten(1, (-1, *kernel))

    def kernel(self, layer: Conv) -> tuple[int, ...]:
        return tuple(layer.kernel_size)

    def product(self, layer: Conv, input: Tensor, matrix: Tensor) -> Tensor:
        kernel = self.held(matrix, layer.kernel_size).to(input.dtype)
        return self.features_last(layer, layer._conv_forward(input, kernel, None))

    def features_last(self, layer: Conv, answer: Tensor) -> Tensor:
        return answer.movedim(-1 - len(layer.kernel_size), -1)

    def as_answered(self, layer: Conv, y: Tensor) -> Tensor:
        return y.movedim(-1, -1 - len(layer.kernel_size))

    def dropped(self, input: Tensor, p: float) -> Tensor:
        return dropout(input, p)


class GroupedConvolution(Convolution):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d in groups, of one channel each too."""

    name = "grouped conv"
    several = True

    def takes(self, layer: Conv) -> bool:
        return Kind.takes(self, layer) and layer.groups > 1

    def product(self, layer: Conv, input: Tensor, matrix: Tensor) -> Tensor:
        kernel = self.held(matrix, layer.kernel_size).to(input.dtype)
        kernel = kernel.repeat(layer.groups, *(1,) * (kernel.dim() - 1))
        y = self.features_last(layer, layer._conv_forward(input, kernel, None))
        return y.unflatten(-1, (layer.groups, len(matrix)))

    def finish(self, layer: Conv, t: Tensor, left: Tensor) -> Tensor:
        return torch.einsum("...gp,gop->...go", t, left.unflatten(0, (layer.groups, -1))).flatten(-2)

    def of_rows(self, layer: Conv, input: Tensor, matrix: Tensor, rows: Tensor) -> Tensor:
        whole = matrix.new_zeros(layer.out_channels, matrix.shape[1]).index_copy(0, rows, matrix)
        kernel = self.held(whole, layer.kernel_size).to(input.dtype)
        return self.features_last(layer, layer._conv_forward(input, kernel, None)).index_select(-1, rows)

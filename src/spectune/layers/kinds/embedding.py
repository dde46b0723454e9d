"""Embeddings: W is (features x rows of the table), and a vector is zero but for the one in its row's place.

A bag's vector is the sum, or the mean, of those of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.layers.kinds.base import Kind


class Lookup(Kind):
    """nn.Embedding, as PEFT has it: x M^T is a row of M^T."""

    name = "embedding"
    classes = (nn.Embedding,)
    looks_up = True

    def refusal(self, layer: nn.Embedding | nn.EmbeddingBag) -> str | None:
        return None if layer.max_norm is None else "with max_norm, which writes to its table when it is asked"

    def matrix(self, held: Tensor) -> Tensor:
        return held.mT

    def held(self, matrix: Tensor, kernel: Sequence[int]) -> Tensor:
        return matrix.mT

    def product(self, layer: nn.Embedding, input: Tensor, matrix: Tensor) -> Tensor:
        # padding_idx, which no gradient goes to, has an answer as any other
        return F.embedding(input, matrix.mT, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)

    def dropped(self, input: Tensor, p: float) -> Tensor:
        return input  # there is nothing but the one, and PEFT leaves it as well


class Bag(Lookup):
    """nn.EmbeddingBag of sums and means, of bags of one size: an input (bags x rows of each)."""

    name = "embedding bag"
    classes = (nn.EmbeddingBag,)

    def refusal(self, layer: nn.EmbeddingBag) -> str | None:
        return "of maxima, which multiplies by no matrix" if layer.mode == "max" else super().refusal(layer)

    def product(self, layer: nn.EmbeddingBag, input: Tensor, matrix: Tensor) -> Tensor:
        by_count, padding = layer.scale_grad_by_freq, layer.padding_idx
        return F.embedding_bag(input, matrix.mT, scale_grad_by_freq=by_count, mode=layer.mode, padding_idx=padding)

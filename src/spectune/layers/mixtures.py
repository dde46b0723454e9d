"""Mixtures of adapters: a weight for each, for the whole batch or for its rows, for all layers or one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from spectune.layers.protocols import Place
from spectune.layers.updates import Update

# the weight of each adapter: a number, a tensor () that takes gradients, or one of these for each layer (0 elsewhere)
Weight = float | Tensor
Mixture = Mapping[str, "Weight | dict[Place, Weight]"]
Part = tuple[Update, Weight]  # an update that answers in a layer, and its adapter's weight there


class RowWeights(NamedTuple):
    """The weight of one adapter in each row of a batch.

    Args:
        column: weights (batch), zero where the adapter has no part.
        rows: the rows (n) where it has.
        weights: their weights (n).
        uses: both, by row, as they were given.
    """

    column: Tensor
    rows: Tensor
    weights: Tensor
    uses: Sequence[tuple[int, Weight]]

    @property
    def moves(self) -> bool:
        """Whether some weights are tensors, whose values may change and which may take gradients."""
        return any(isinstance(weight, Tensor) for _, weight in self.uses)


def weight_at(mixture: Mixture, name: str, layer: Place) -> Weight:
    """Return the weight of an adapter in one layer, 0 where it has no part."""
    weight = mixture.get(name, 0.0)
    return weight.get(layer, 0.0) if isinstance(weight, dict) else weight

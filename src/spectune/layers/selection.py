"""Which adapters answer, with which weights, in which rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.mixtures import Mixture, RowWeights, weight_at
from spectune.layers.protocols import Layer
from spectune.layers.stacks import RoutedForward, Stack


class Rows:
    """A mixture of adapters for each row of a batch.

    Args:
        mixtures: adapter names and weights of each row.
        stacks: the factors that are held side by side, which other batches may go on from.
    """

    def __init__(self, mixtures: Sequence[Mixture], stacks: dict[Any, Stack] | None = None) -> None:
        self.mixtures = list(mixtures)
        self.stacks = {} if stacks is None else stacks
        self._forwards: dict[Any, RoutedForward] = {}
        self._by_layer = {name for row in mixtures for name, weight in row.items() if isinstance(weight, dict)}
        self._shares: dict[tuple[str, Layer | None, int, torch.device], RowWeights | None] = {}

    def share(self, name: str, layer: Layer, times: int, device: torch.device) -> RowWeights | None:
        """Return an adapter's part in a layer, or None if it has none; a row stands for `times` rows of the batch."""
        key = (name, layer if name in self._by_layer else None, times, device)
        if key not in self._shares:
            column = [weight_at(row, name, layer) for row in self.mixtures for _ in range(times)]
            rows = [i for i, weight in enumerate(column) if isinstance(weight, Tensor) or weight]
            if any(isinstance(weight, Tensor) for weight in column):
                weights = torch.stack([torch.as_tensor(w, dtype=torch.float32, device=device) for w in column])
            else:
                weights = torch.tensor(column, device=device)
            index = torch.tensor(rows, device=device, dtype=torch.int64)
            uses = [(i, weight.detach() if isinstance(weight := column[i], Tensor) else weight) for i in rows]
            self._shares[key] = RowWeights(weights, index, weights[index], uses) if rows else None
        return self._shares[key]

    def times(self, x: Tensor, expandable: bool) -> int:
        """Return for how many consecutive rows of a layer's input x a mixture stands; more than one if `expandable`."""
        given = len(self.mixtures)
        times, rest = divmod(x.shape[0], given)
        if rest or x.dim() < 2 or (times != 1 and x.dim() > 2 and not expandable):
            raise SpectuneError(
                f"route was given {given} rows and the input of a layer is {tuple(x.shape)}; give one entry for "
                "each row of the batch"
            )
        return times

    def shares(self, layer: Layer, x: Tensor, times: int) -> dict[str, RowWeights]:
        """Return the part of each adapter that has one in a layer."""
        shares = {name: self.share(name, layer, times, x.device) for name in layer.adapters}
        return {name: share for name, share in shares.items() if share is not None}

    def forward_of(self, layer: Layer, x: Tensor, expandable: bool) -> RoutedForward:
        """Return how a layer answers without gradients, kept as long as its adapters do not change."""
        times = self.times(x, expandable)
        key = (layer, times, x.dtype, x.device, layer.training)
        found = self._forwards.get(key)
        if found is None or found.outdated:
            found = self._forwards[key] = RoutedForward(layer, self.shares(layer, x, times), x, self.stacks)
        return found


class Selection:
    """Which adapters answer, shared by the adapted layers of a model.

    Args:
        frozen: the parameters that adapting froze, to be set free by detaching.

    Attributes:
        mixture: adapter names and weights for every row.
        rows: a mixture for each row of the batch instead.
        expandable: each row of `rows` may stand for several consecutive rows of the batch (beams).
        factored: whether training goes through the factors of W where a basis holds all of it.
    """

    def __init__(self, frozen: Iterable[nn.Parameter] = ()) -> None:
        self.mixture: Mixture = {}
        self.rows: Rows | None = None
        self.expandable = False
        self.factored = False
        self.frozen = list(frozen)

    def weights(self, layer: Layer, x: Tensor) -> dict[str, float | RowWeights]:
        """Return the weight of each adapter in use in a layer: a number, or one for each row of its input x."""
        if self.rows is None:
            there = layer.adapters._modules  # of which there may be many more than are in use
            weights = {name: weight_at(self.mixture, name, layer) for name in self.mixture if name in there}
            # a tensor of zero takes gradients too, and a look at it would wait for the device
            return {n: weight for n, weight in weights.items() if isinstance(weight, Tensor) or weight}  # type: ignore
        return self.rows.shares(layer, x, self.rows.times(x, self.expandable))  # type: ignore[return-value]

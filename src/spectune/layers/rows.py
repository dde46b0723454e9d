"""A mixture of adapters for each row of a batch: who has a part in a layer, and where its rows lie there."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.layouts import UNTRIED, Layout, Layouts
from spectune.layers.mixtures import Mixture, RowWeights, Weight, weight_at
from spectune.layers.protocols import Layer, Place
from spectune.layers.routed import RoutedForward
from spectune.layers.stacks import Stack


class Rows:
    """A mixture of adapters for each row of a batch.

    Args:
        mixtures: adapter names and weights of each row.
        layouts: where rows lie in the inputs of layers.
        stacks: the factors that are held side by side, which other batches may go on from.

    Attributes:
        count: how many rows the batch at hand has; with beams a multiple of the mixtures.
        alike: whether every row has the same mixture.
    """

    def __init__(
        self, mixtures: Sequence[Mixture], layouts: Layouts | None = None, stacks: dict[object, Stack] | None = None
    ) -> None:
        self.mixtures = list(mixtures)
        self.layouts = Layouts() if layouts is None else layouts
        self.stacks = {} if stacks is None else stacks
        self.count: int | None = None
        self._kinds: dict[object, list[int]] = {}
        for i, mixture in enumerate(mixtures):
            self._kinds.setdefault(_identity(mixture), []).append(i)
        self.alike = len(self._kinds) == 1
        self._forwards: dict[object, RoutedForward] = {}
        self._by_layer = {name for row in mixtures for name, weight in row.items() if isinstance(weight, dict)}
        self._shares: dict[tuple[str, Layer | None, int, torch.device], RowWeights | None] = {}
        self._layouts: dict[tuple[Place, int], Layout | None] = {}

    def groups(self) -> list[tuple[Mixture, list[int]]]:
        """Return the different mixtures, and the rows of the batch at hand that have each."""
        times = (self.count or len(self.mixtures)) // len(self.mixtures)
        return [
            (self.mixtures[rows[0]], [row * times + i for row in rows for i in range(times)])
            for rows in self._kinds.values()
        ]

    def layout(self, layer: Place, x: Tensor) -> Layout | None:
        """Return where rows lie in a layer's input x, or None where the layer answers all of them alike.

        Raises:
            SpectuneError: that cannot be said.
        """
        key = (layer, x.dim())
        if key in self._layouts:
            return self._layouts[key]
        place = None if self.same(layer) else self.layouts.places.get(key, UNTRIED)
        if place is None or isinstance(place, Layout):
            self._layouts[key] = place
            return place
        if self.count is None and place == UNTRIED:  # the layer itself was called with the batch
            return Layout()
        name, why = self.layouts.names.get(layer, "a layer"), place
        if place == UNTRIED and self.layouts.failure is not None:
            why = f"the model could not be tried with two of the rows ({self.layouts.failure})"
        raise SpectuneError(
            f"rows cannot have different adapters in {name!r}, whose input has {x.dim()} axes: {why}; leave the layer "
            "out of the adapters, or give all rows the same choice"
        )

    def forget(self) -> None:
        """Look again where rows lie, since more is known."""
        self._layouts.clear()

    def same(self, layer: Place) -> bool:
        """Whether all rows have the same mixture in a layer."""
        if self.alike:
            return True
        first, *others = (self.mixtures[rows[0]] for rows in self._kinds.values())
        there = layer.adapters._modules
        return all(_same(weight_at(first, n, layer), weight_at(row, n, layer)) for row in others for n in there)

    def share(self, name: str, layer: Layer, times: int, device: torch.device) -> RowWeights | None:
        """Return an adapter's part in a layer, or None if it has none; a row stands for `times` rows of the batch."""
        # most weights are the same in all layers, which then share the tensors of them
        key = (name, layer if name in self._by_layer else None, times, device)
        if key not in self._shares:
            column = [weight_at(row, name, layer) for row in self.mixtures for _ in range(times)]
            with torch.inference_mode(False), torch.no_grad():  # kept, and a pass with gradients may come
                self._shares[key] = _share(column, device)
        share = self._shares[key]
        if share is None or not share.moves:
            return share
        # made for each pass, whose graph they are in: a tensor's value may be another one by the next
        weights = torch.stack([torch.as_tensor(w, dtype=torch.float32, device=device) for _, w in share.uses])
        column = torch.zeros(len(share.column), device=device).index_copy(0, share.rows, weights)
        return share._replace(column=column, weights=weights)

    def times(self, layer: Layer, x: Tensor, layout: Layout) -> int:
        """Return for how many consecutive slices of a layer's input x, its rows in front, a mixture stands."""
        given, count = len(self.mixtures), self.count or len(self.mixtures)
        each, rest = divmod(x.shape[0], count) if x.dim() > 1 else (0, 0)
        if rest or not each or (each != 1 and not layout.several):
            raise SpectuneError(
                f"route was given {given} rows and the input of {self.layouts.names.get(layer, 'a layer')!r} is "
                f"{tuple(x.shape)}; give one entry for each row of the batch"
            )
        return x.shape[0] // given

    def shares(self, layer: Layer, x: Tensor, layout: Layout) -> dict[str, RowWeights]:
        """Return the part of each adapter that has one in a layer, whose input x has rows in front."""
        return self._shares_of(layer, self.times(layer, x, layout), x.device)

    def _shares_of(self, layer: Layer, times: int, device: torch.device) -> dict[str, RowWeights]:
        shares = {name: self.share(name, layer, times, device) for name in layer.adapters}
        return {name: share for name, share in shares.items() if share is not None}

    def forward_of(self, layer: Layer, x: Tensor, layout: Layout) -> RoutedForward:
        """Return how a layer answers without gradients, kept as long as its adapters do not change."""
        key = (layer, x.shape[0], x.dim(), self.count, x.dtype, x.device, layer.training, get_ident())
        found = self._forwards.get(key)
        if found is None or found.outdated:
            shares = self.shares(layer, x, layout)
            found = self._forwards[key] = RoutedForward(layer, shares, x, self.stacks)
        return found


def _share(column: Sequence[Weight], device: torch.device) -> RowWeights | None:
    """Return what is known of an adapter's weights in each row before a pass; None where it has no part."""
    uses = [(i, weight) for i, weight in enumerate(column) if isinstance(weight, Tensor) or weight]
    if not uses:
        return None
    rows = torch.tensor([i for i, _ in uses], device=device, dtype=torch.int64)
    weights = torch.tensor([float(weight) for weight in column], device=device)
    return RowWeights(weights, rows, weights[rows], uses)


def _identity(mixture: Mixture) -> object:
    """Return what equal mixtures have in common."""

    # a tensor is told by its identity: equal numbers may be different parameters, of which each takes its own gradient
    def of(weight: object) -> object:
        if isinstance(weight, dict):
            return tuple((id(layer), of(w)) for layer, w in weight.items())
        return id(weight) if isinstance(weight, Tensor) else weight

    return frozenset((name, of(weight)) for name, weight in mixture.items())


def _same(a: object, b: object) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)

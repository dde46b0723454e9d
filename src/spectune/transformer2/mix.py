"""A mixture of a library's adapters, with weights for groups of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.transformer2.library import Library

# a weight for each name: a number, or one for each layer
Mixture = Mapping[str, float | Tensor | Mapping[str, float | Tensor]]

By = Literal["global", "layer", "projection"]


@dataclass(frozen=True)
class Mix:
    """A mixture that was found, by groups of layers.

    Args:
        names: the adapters.
        by: what the groups are.
        groups: layer name -> its group.
        kinds: the groups.
        weights: (groups x adapters).
        score: on the shots.
        history: the best score after each iteration.
        evaluations: how many mixtures were tried.
        seconds: what the search took.
    """

    names: tuple[str, ...]
    by: By
    groups: Mapping[str, str] = field(repr=False)
    kinds: tuple[str, ...]
    weights: Tensor
    score: float = 0.0
    history: tuple[float, ...] = field(default=(), repr=False)
    evaluations: int = 0
    seconds: float = 0.0

    def mixture(self, weights: Tensor | None = None) -> Mixture:
        """Return the mixture, or that of other weights, which keep their gradient."""
        weights = self.weights if weights is None else weights
        table = weights if weights.requires_grad else weights.tolist()
        if self.by == "global":
            return {name: table[0][k] for k, name in enumerate(self.names)}
        index = {kind: i for i, kind in enumerate(self.kinds)}
        rows = {layer: table[index[kind]] for layer, kind in self.groups.items()}
        return {name: {layer: row[k] for layer, row in rows.items()} for k, name in enumerate(self.names)}

    def adapter(self, library: Library) -> Adapter:
        """Return the mixture as one adapter: the sum of the library's, each times its weight, layer by layer.

        Raises:
            SpectuneError: all weights are zero, which is the base.
        """
        parts = []
        for k, name in enumerate(self.names):
            if not self.weights[:, k].any():
                continue
            column = dict(zip(self.kinds, self.weights[:, k].tolist(), strict=True))
            adapter = library.adapter(name)
            parts.append(adapter.by_layer({layer: column[self.groups[layer]] for layer in adapter.layers}))
        if not parts:
            raise SpectuneError("every weight of the mixture is 0: the base alone does best on the shots")
        return reduce(lambda a, b: a + b, parts)

    def summary(self) -> dict[str, object]:
        """Return the mixture and how it was found as JSON values."""
        table = {
            kind: dict(zip(self.names, row, strict=True))
            for kind, row in zip(self.kinds, self.weights.tolist(), strict=True)
        }
        return {
            "by": self.by,
            "weights": table,
            "score": self.score,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }


def layer_groups(layers: Iterable[str], by: By) -> dict[str, str]:
    """Return the group of each layer: "all", the number of its block, or the kind of its projection."""
    if by == "global":
        return dict.fromkeys(layers, "all")
    if by == "projection":
        return {layer: layer.rpartition(".")[2] for layer in layers}
    numbers = {layer: re.search(r"(?<![^.])\d+(?![^.])", layer) for layer in layers}
    return {layer: number.group() if number else "other" for layer, number in numbers.items()}

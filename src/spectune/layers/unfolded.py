"""Adapted layers that are no linear layers: the same updates, of vectors that the layer's kind makes of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spectune.layers.adapted import Adapted
from spectune.layers.kinds import Kind, Vectors, kind_of
from spectune.layers.layouts import Layout
from spectune.layers.mixtures import Part, RowWeights, Weight
from spectune.layers.modules import effective_weight
from spectune.layers.rows import Rows
from spectune.layers.sums import with_updates
from spectune.layers.updates import Update, updates_in


class Unfolded(Adapted):
    """Mixed into the class of a layer of another kind: its own answer, and the updates of x W^T beside it."""

    @property
    def kind(self) -> Kind:
        """What makes vectors of the layer's input."""
        found = kind_of(self)
        assert found is not None
        return found

    def _of_parts(self, parts: Sequence[Part], x: Tensor) -> Tensor:
        return self._with(parts, x) if parts else self._own(x)

    def _by_row(self, x: Tensor, rows: Rows, layout: Layout) -> Tensor:
        shares = rows.shares(self, x, layout).items()
        updates = [(u, share) for name, share in shares for u in updates_in(self.adapters, name)]
        return self._with(updates, x) if updates else self._own(x)

    def _with(self, updates: Sequence[tuple[Update, Weight | RowWeights]], x: Tensor) -> Tensor:
        plain = self.kind.features_last(self, self._own(x))
        dtype = x.dtype if x.is_floating_point() else plain.dtype
        vectors: Any = Vectors(self.kind, self, x, (*plain.shape[:-1], effective_weight(self).shape[1]), dtype)
        return self.kind.as_answered(self, with_updates(self, updates, vectors, plain, plain))

    def _plain(self, x: Tensor | Vectors) -> Tensor:
        return self.kind.features_last(self, self._own(x.input)) if isinstance(x, Vectors) else self._own(x)

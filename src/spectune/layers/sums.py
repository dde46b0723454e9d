"""Sums of updates: those over one basis core by core, the others one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spectune.layers.cores import mix
from spectune.layers.factors import Factors
from spectune.layers.mixtures import RowWeights, Weight
from spectune.layers.protocols import Layer
from spectune.layers.updates import Update


def with_updates(
    layer: Layer, updates: Sequence[tuple[Update, Weight | RowWeights]], x: Tensor, plain: Tensor, y: Tensor
) -> Tensor:
    """Return y and the answer of several updates, or of updates that differ by row; the base's is `plain`."""
    over_bases: dict[object, list[tuple[Factors, Weight | RowWeights, float]]] = {}
    for update, weight in updates:
        if not update.method.core_only:
            y = _added(layer, y, update, weight, x, plain)
            continue
        factors = update.method.factors(layer.tensors(update))
        # factors of the same basis are the same tensors, so that only the cores are added, whatever the number of
        # adapters
        core: object = factors.core  # never the identity, which has nothing to train
        key = (update.basis_key, core.layout)
        over_bases.setdefault(key, []).append((factors, weight, update.weight))
    for group in over_bases.values():
        y = y + _joined(group).apply(x)
    return y


def _added(layer: Layer, y: Tensor, update: Update, weight: Weight | RowWeights, x: Tensor, plain: Tensor) -> Tensor:
    tensors = layer.tensors(update)
    if isinstance(weight, RowWeights):
        rows = weight.rows
        part = update.method.respond(tensors, x[rows], layer.base(plain[rows]), update.training)
        scale = (weight.weights * update.weight).to(part.dtype)
        return y.index_add(0, rows, part * scale.reshape(-1, *(1,) * (part.dim() - 1)))
    part = update.method.respond(tensors, x, layer.base(plain), update.training)
    return y + part * (weight * update.weight)


def _joined(group: list[tuple[Factors, Weight | RowWeights, float]]) -> Factors:
    """Add updates over one basis into one, with a core for each row where the weights differ by row."""
    first, weight, factor = group[0]
    # a scale costs less than a core that is made for it
    if len(group) == 1 and not isinstance(weight, RowWeights):
        return first._replace(scale=first.scale * weight * factor)
    weights = [(w.column if isinstance(w, RowWeights) else w) * (factor * f.scale) for f, w, factor in group]
    return first._replace(core=mix([f.core for f, _, _ in group], weights), scale=1.0)

"""The weights that adapters make of a layer's own, as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from spectune.errors import SpectuneError
from spectune.layers.frozen import FrozenLayer
from spectune.layers.fused import has_bias, whole_bias, whole_weight
from spectune.layers.mixtures import Mixture, weight_at
from spectune.layers.modules import as_held, effective_weight, stored_weight
from spectune.layers.packed import Packed
from spectune.layers.protocols import Place
from spectune.layers.rows import Rows
from spectune.layers.selection import Selection
from spectune.layers.updates import Update, updates_in
from spectune.layers.watched_layer import WatchedLayer


class _Chosen(Place, Protocol):
    """What has a choice of adapters: a layer, or a module that adapters bring whole."""

    selection: Selection


def active_adapters(part: _Chosen, mixture: Mixture | None = None) -> tuple[tuple[str, float], ...]:
    """Return the adapters that have a part in a layer or module, with their weights."""
    chosen: Mixture = part.selection.mixture if mixture is None else mixture
    return tuple((n, float(w)) for n in part.adapters if (w := weight_at(chosen, n, part)))


def merged_weight(
    layer_name: str, layer: FrozenLayer, active: Sequence[tuple[str, float]], *, requantize: bool = False
) -> Tensor:
    """Return W', as the layer holds W; a packed one in float32 if it is to be packed again.

    Raises:
        SpectuneError: the weight cannot hold the sum.
    """
    if stored_weight(layer) is None:
        # torch's older functions, of a hook, have a way back each: remove_weight_norm, remove_spectral_norm, prune
        plain = "parametrize.remove_parametrizations" if is_parametrized(layer, "weight") else "remove_weight_norm"
        raise SpectuneError(
            f"the weight of {layer_name!r} is computed from other parameters, as weight_norm does, and cannot hold a "
            f"merged update: detach, make it a plain one with torch.nn.utils.{plain} or what takes off what it was put "
            "under, and attach again, or keep the adapter beside it"
        )
    weight = effective_weight(layer).detach()
    if isinstance(weight, Packed):
        if requantize:
            return whole_weight(layer, _parts(layer, active), torch.float32)
        raise SpectuneError(
            f"the weight of {layer_name!r} is packed ({type(weight.held).__name__}), and W' would be rounded to as few "
            "bits, which can lose the update: merge(requantize=True) does it all the same; else keep the adapter "
            "beside it (spectune.extract(model).save(folder))"
        )
    if not weight.is_floating_point():
        raise SpectuneError(
            f"the weight of {layer_name!r} is {weight.dtype} and cannot hold a merged update: dequantize the model "
            "first, or keep the adapter beside it"
        )
    parts = _parts(layer, active)
    update, factor = parts[0]
    if update.method.replaces and len(parts) == 1 and factor * update.weight == 1.0:
        total = update.trained()["H"].detach().to(weight.dtype, copy=True)  # to the last bit, so that tied ones stay so
    else:
        total = whole_weight(layer, parts)
    return as_held(layer, total)


def _parts(layer: FrozenLayer, active: Sequence[tuple[str, float]]) -> list[tuple[Update, float]]:
    return [(u, factor) for name, factor in active if name in layer.adapters for u in updates_in(layer.adapters, name)]


def merged_bias(layer: FrozenLayer, active: Sequence[tuple[str, float]]) -> Tensor | None:
    """Return the layer's new bias, or None where no update has one."""
    parts = _parts(layer, active)
    return whole_bias(layer, parts) if any(has_bias(update) for update, _ in parts) else None


def merged_tensors(layer_name: str, layer: FrozenLayer) -> dict[str, Tensor]:
    """Return W' and b', as far as the adapters that answer now make them, by their names in the layer.

    Raises:
        SpectuneError: the weight cannot hold the sum, or the layer has no bias and would need one.
    """
    active = active_adapters(layer)
    if not active:
        return {}
    found, bias = {"weight": merged_weight(layer_name, layer, active)}, merged_bias(layer, active)
    if bias is None:
        return found
    if layer.bias is None:
        raise SpectuneError(
            f"the adapter gives {layer_name!r} a bias, which the model has no place for: save the adapter with "
            "spectune.extract(model).save(folder)"
        )
    return {**found, "bias": bias}


def weight_with_gradients(layer: WatchedLayer, dtype: torch.dtype | None = None) -> Tensor:
    """Return W' (out x in) of the adapters that answer here, with their gradients, in a dtype or in W's.

    It is for whoever does something else with a weight than multiply vectors by it.

    Raises:
        SpectuneError: there is no one W', or it is not all that the adapters do.
    """
    scope = layer.selection.scope_with_gradients() if torch.is_grad_enabled() else layer.selection.scope()
    if isinstance(scope.choice, Rows) and not scope.choice.same(layer):
        raise SpectuneError("rows of the batch have different adapters")
    parts = layer.parts(scope)
    if any(update.drops and update.training for update, _ in parts):
        raise SpectuneError("with dropout, which is of its products' inputs")
    if any(has_bias(update) for update, _ in parts):
        raise SpectuneError("an adapter brings a bias")
    weight = effective_weight(layer)
    total = weight if dtype is None else weight.to(dtype)
    # not in place, and in W's dtype as the model multiplies by it: autograd goes through each update
    for update, factor in parts:
        total = total + update.method.delta(layer.tensors(update), weight) * (factor * update.weight)
    total = total.to(dtype or weight.dtype)
    layer.selection.in_graph(scope, total)
    return total

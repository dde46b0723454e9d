"""The weights that adapters make of a layer's own, as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted
from spectune.layers.experts import ExpertLinear, tensor_of
from spectune.layers.fused import has_bias, whole_bias, whole_weight
from spectune.layers.mixtures import Mixture, weight_at
from spectune.layers.modules import effective_weight, is_stored_transposed, stored_weight
from spectune.layers.packed import Packed
from spectune.layers.whole import Part
from spectune.model.names import updates_of


def active_adapters(part: Part, mixture: Mixture | None = None) -> tuple[tuple[str, float], ...]:
    """Return the adapters that have a part in a layer or module, with their weights."""
    mixture = part.selection.mixture if mixture is None else mixture
    return tuple((n, float(w)) for n in part.adapters if (w := weight_at(mixture, n, part)))


def merged_weight(
    layer_name: str, layer: Adapted, active: Sequence[tuple[str, float]], *, requantize: bool = False
) -> Tensor:
    """Return W', as the layer holds W; a packed one in float32 if it is to be packed again.

    Raises:
        SpectuneError: the weight cannot hold the sum.
    """
    if stored_weight(layer) is None:
        raise SpectuneError(
            f"the weight of {layer_name!r} is computed from other parameters, as weight_norm does, and cannot hold a "
            "merged update: detach, make it a plain one with torch.nn.utils.parametrize.remove_parametrizations, and "
            "attach again, or keep the adapter beside it"
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
    total = whole_weight(layer, _parts(layer, active))
    return total.mT.contiguous() if is_stored_transposed(layer) else total


def _parts(layer: Adapted, active: Sequence[tuple[str, float]]) -> list[tuple[object, float]]:
    return [(update, factor) for name, factor in active for update in updates_of(layer, name)]


def merged_bias(layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor | None:
    """Return the layer's new bias, or None where no update has one."""
    parts = _parts(layer, active)
    return whole_bias(layer, parts) if any(has_bias(update) for update, _ in parts) else None


def in_experts(weights: Iterable[tuple[ExpertLinear, Tensor]]) -> dict[tuple[nn.Module, str], Tensor]:
    """Return the tensors of modules of experts with other weights, as the module holds them, for some of the experts.

    Args:
        weights: the layer of each and its W', one at a time in memory.
    """
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for layer, weight in weights:
        key = layer.experts, layer.key
        if key not in found:
            found[key] = tensor_of(*key).detach().clone()
        found[key][layer.index] = weight
    return found

"""Adapters folded into the weights of their layers, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers, take_over
from spectune.layers.fused import has_bias, whole_bias, whole_weight
from spectune.layers.mixtures import Mixture, weight_at
from spectune.layers.modules import effective_weight, is_conv1d
from spectune.layers.shards import whole
from spectune.model.install import selections
from spectune.model.lifecycle import detach
from spectune.model.names import M, check_own_weights, check_some_adapter, updates_of
from spectune.model.routing import Choice, mixture_of
from spectune.model.targets import FRESH

_RECORD = "spectune_merged"  # an attribute of what merging changed


@dataclass
class _Layer:
    """What a layer was before: its parameters, what it held as an adapted one, and the parameters that it has now."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    parts: dict[str, Any]
    fresh: Any
    merged: tuple[Any, Any] = (None, None)
    sums: Any = None


class _Ties(NamedTuple):
    """What a transformers model says of its tied weights: by name, by its configuration's flag, and those in it too."""

    keys: Any
    flag: Any
    all_keys: Any


def merge(model: M, names: Choice | Sequence[str] = None, safe: bool = True, *, keep: bool = True) -> M:
    """Fold adapters into new weights, and take every adapter off: plain layers again.

    Tied weights stay tied unless an adapter is on one of them.

    Args:
        model: a model with adapters.
        names: what to fold in: an adapter, several, or a mixture as for `activate`; None is what answers now.
        safe: look at every new weight, and raise where one is not finite.
        keep: hold the old weights and the adapters, so that `unmerge` can give them back; else they go.

    Returns:
        The model.

    Raises:
        SpectuneError: no such adapter is on the model, or a layer's weight cannot hold the sum; nothing is changed.
    """
    layers = adapted_layers(model)
    check_some_adapter(layers)
    check_own_weights(layers)
    if names is not None and not isinstance(names, (str, Mapping)):
        names = dict.fromkeys(names, 1.0)
    chosen: Mixture | None = None if names is None else mixture_of(layers, names)
    merged: dict[str, tuple[Tensor, Tensor | None]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            mixture = layer.selection.mixture if chosen is None else chosen
            active = [(n, float(w)) for n in layer.adapters if (w := weight_at(mixture, n, layer))]
            if active:
                with torch.autocast(layer.weight.device.type, enabled=False):
                    merged[name] = _merged_weight(name, layer, active), _merged_bias(layer, active)
                if safe and not all(_finite(t) for t in merged[name]):
                    raise SpectuneError(
                        f"merging {', '.join(repr(n) for n, _ in active)} into {name!r} gives values that are not "
                        "finite: the adapter is broken there; safe=False would merge it all the same"
                    )
    parts = {name: _parts_of(layer) for name, layer in layers.items()}
    ties = _ties(model)
    detach(model)
    for name, layer in layers.items():
        record = _Layer(name, layer.weight, layer.bias, parts[name], vars(layer).get(FRESH))
        if name in merged:
            weight, bias = merged[name]
            layer.weight = nn.Parameter(weight, requires_grad=record.weight.requires_grad)  # type: ignore[misc]
            vars(layer).pop(FRESH, None)
            if bias is not None:
                layer.bias = nn.Parameter(bias, requires_grad=record.weight.requires_grad)
        if keep:
            record.merged, record.sums = (layer.weight, layer.bias), _sums(layer)
            vars(layer)[_RECORD] = record
    _untie(model, ties, keep)
    return model


def unmerge(model: M) -> M:
    """Give the layers the weights back that they had before `merge`, bit for bit, with their adapters as they were.

    Args:
        model: a model that `merge` was called on, with `keep`.

    Returns:
        The model.

    Raises:
        SpectuneError: nothing was merged or kept, the model was adapted again, or a merged weight was written to.
    """
    records: dict[Any, _Layer] = {m: r for m in model.modules() if isinstance(r := vars(m).get(_RECORD), _Layer)}
    if not records:
        raise SpectuneError("no merged adapter can be taken out of the model: none was merged, or with keep=False")
    for layer, record in records.items():
        if isinstance(layer, Adapted):
            raise SpectuneError(f"{record.name!r} was adapted again after merging: detach the newer adapters first")
        if layer.weight is not record.merged[0] or layer.bias is not record.merged[1] or _differ(layer, record.sums):
            raise SpectuneError(
                f"the merged weight of {record.name!r} is another one now: load the base and attach the adapter instead"
            )
    for layer, record in records.items():
        now = layer.weight
        for name, held in (("weight", record.weight), ("bias", record.bias)):
            if held is not None:
                held.data = held.data.to(now.device)
            setattr(layer, name, held)
        del vars(layer)[_RECORD]
        if record.fresh is not None:
            setattr(layer, FRESH, record.fresh)
        parts = dict(record.parts)
        mixture = parts.pop("mixture")
        adapted = take_over(layer, record.name, parts.pop("selection"))
        adapted.adapters, adapted.bases = parts["adapters"].to(now.device), parts["bases"].to(now.device)
        if adapted.selection.mixture != mixture:
            adapted.selection.mixture = mixture
    for part in _transformers_models(model):
        before: _Ties | None = vars(part).pop(_RECORD, None)
        if before is not None:
            _set_ties(part, before)
    there = adapted_layers(model)
    own = {id(p) for layer in there.values() for p in layer.adapters.parameters()}
    for layer in there.values():
        layer.parts(layer.selection.scope_of_model)
    for selection in selections(there):
        selection.freeze(p for p in model.parameters() if id(p) not in own)
    return model


def _parts_of(layer: Adapted) -> dict[str, Any]:
    """Return what detaching takes from a layer."""
    return {
        "adapters": nn.ModuleDict(layer.adapters.items()),
        "bases": nn.ModuleDict(layer.bases.items()),
        "selection": layer.selection,
        "mixture": layer.selection.mixture,
    }


def _merged_weight(layer_name: str, layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor:
    if "weight" not in layer._parameters:
        raise SpectuneError(
            f"the weight of {layer_name!r} is computed from other parameters, as weight_norm does, and cannot hold a "
            "merged update: detach, make it a plain one with torch.nn.utils.parametrize.remove_parametrizations, and "
            "attach again, or keep the adapter beside it"
        )
    weight = effective_weight(layer).detach()
    if not weight.is_floating_point():
        raise SpectuneError(
            f"the weight of {layer_name!r} is {weight.dtype} and cannot hold a merged update: dequantize the model "
            "first, or keep the adapter beside it"
        )
    total = whole_weight(layer, _parts(layer, active))
    return total.T.contiguous() if is_conv1d(layer) else total


def _parts(layer: Adapted, active: Sequence[tuple[str, float]]) -> list[tuple[Any, float]]:
    return [(update, factor) for name, factor in active for update in updates_of(layer, name)]


def _merged_bias(layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor | None:
    """Return the layer's new bias, or None where no update has one."""
    parts = _parts(layer, active)
    return whole_bias(layer, parts) if any(has_bias(update) for update, _ in parts) else None


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_meta or bool(whole(tensor.isfinite().all()))


def _sums(layer: Any) -> tuple[torch.dtype, list[tuple[float, float]]]:
    """Return what tells whether a layer's parameters are as they were: their sums and sums of sizes."""
    held = [p.detach() for p in (layer.weight, layer.bias) if p is not None and not p.is_meta]
    sums = [(p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64)) for p in held]
    return layer.weight.dtype, [(float(whole(a)), float(whole(b))) for a, b in sums]


def _differ(layer: Any, before: tuple[torch.dtype, list[tuple[float, float]]]) -> bool:
    dtype, sums = _sums(layer)
    near = all(
        abs(a - b) <= 1e-10 * size and abs(s - size) <= 1e-10 * size
        for (a, s), (b, size) in zip(sums, before[1], strict=True)
    )
    return dtype != before[0] or not near


# -- tied weights, as transformers writes and reads them


def _transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _ties(model: nn.Module) -> list[tuple[PreTrainedModel, dict[str, str]]]:
    """Return the pairs of parameters, by name, that each transformers model ties and that are one now."""
    found = []
    for part in _transformers_models(model):
        pairs = part.get_expanded_tied_weights_keys(all_submodels=False)
        found.append((part, {a: b for a, b in pairs.items() if _are_one(part, a, b)}))
    return found


def _are_one(part: nn.Module, first: str, second: str) -> bool:
    parameters = dict(part.named_parameters(remove_duplicate=False))
    return first in parameters and parameters[first] is parameters.get(second)


def _untie(model: nn.Module, ties: list[tuple[PreTrainedModel, dict[str, str]]], keep: bool) -> None:
    """Have transformers models tie no more what is no longer one, and all else as before.

    Where a pair stays tied the configuration's flag stays as well, since it stands for all pairs; a checkpoint that
    holds both parameters of a pair is loaded without tying them.
    """
    left = [{a: b for a, b in pairs.items() if _are_one(part, a, b)} for part, pairs in ties]
    in_use = {id(part.config) for (part, _), remaining in zip(ties, left, strict=True) if remaining}
    for (part, pairs), remaining in zip(ties, left, strict=True):
        if remaining == pairs:
            continue
        before = _Ties(part._tied_weights_keys, part.config.tie_word_embeddings, dict(part.all_tied_weights_keys))
        kept = {a: b for a, b in before.all_keys.items() if a not in pairs or a in remaining}
        _set_ties(part, _Ties(remaining, before.flag and id(part.config) in in_use, kept))
        if keep:
            vars(part)[_RECORD] = before


def _set_ties(part: Any, ties: _Ties) -> None:
    part._tied_weights_keys, part.all_tied_weights_keys = ties.keys, ties.all_keys
    part.config.tie_word_embeddings = ties.flag

"""Adapters folded into the weights of their layers, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.attention import see_to_attention
from spectune.layers.merged import active_adapters, merged_bias, merged_weight
from spectune.layers.mixtures import Mixture
from spectune.layers.modules import effective_weight, offloading, stored_weight
from spectune.layers.packed import keep_layout, packed_again
from spectune.layers.parts import PartLinear, put_together
from spectune.layers.shards import whole
from spectune.layers.whole import Whole, parts_of, whole_modules
from spectune.model.fresh import FRESH, mark_loaded
from spectune.model.install import selections
from spectune.model.lifecycle import detach
from spectune.model.merge_records import RECORD, Held, MergedLayer, MergedModule, MergedOwner, Placed, records_of
from spectune.model.names import M, check_own_weights, check_some_adapter
from spectune.model.routing import Choice, mixture_of
from spectune.model.saving import watch_saving
from spectune.model.ties import Ties, are_one, say_of_ties, tied_pairs, transformers_models, untie


@dataclass
class _New:
    """What merging puts in the place of what is there, all of it made before anything changes."""

    layers: dict[str, tuple[Tensor, Tensor | None]]
    owned: dict[tuple[nn.Module, str], Tensor]
    modules: dict[str, dict[str, Tensor]]


def merge(
    model: M,
    names: Choice | Sequence[str] = None,
    safe: bool = True,
    *,
    keep: bool = True,
    requantize: bool = False,
) -> M:
    """Fold adapters into new weights, and take every adapter off: plain layers again.

    Tied weights stay tied unless an adapter is on one of them.

    Args:
        model: a model with adapters.
        names: what to fold in: an adapter, several, or a mixture as for `activate`; None is what answers now.
        safe: look at every new weight, and raise where one is not finite.
        keep: hold the old weights and the adapters, so that `unmerge` can give them back; else they go.
        requantize: pack W' again where W is packed in 4 or 8 bits, which rounds it; else such a weight is refused.

    Returns:
        The model.

    Raises:
        SpectuneError: no such adapter is on the model, or a layer's weight cannot hold the sum; nothing is changed.
    """
    layers, modules = adapted_layers(model), whole_modules(model)
    check_some_adapter({**layers, **modules})
    check_own_weights(layers)
    if names is not None and not isinstance(names, (str, Mapping)):
        names = dict.fromkeys(names, 1.0)
    chosen: Mixture | None = None if names is None else mixture_of({**layers, **modules}, names)
    new = _made(layers, modules, chosen, safe, requantize)
    held = {name: Held.by(layer) for name, layer in layers.items()}
    owners = _by_owner(layers, held)
    own = {name: (nn.ModuleDict(dict(module.adapters.items())), module.selection) for name, module in modules.items()}
    ties = tied_pairs(model)
    detach(model)
    placed = Placed()
    for owner, parts in owners.items():
        _put_owned(owner, MergedOwner({}, {}, parts), new, placed, keep)
    for name, layer in layers.items():
        if not isinstance(layer, PartLinear):
            _put_layer(name, layer, held[name], new.layers.get(name), placed, keep)
    for name, module in modules.items():
        record = MergedModule(name, {}, {}, *own[name], vars(module).get(FRESH))
        _put_module(module, record, new.modules.get(name, {}), placed, keep)
    mark_loaded(model, placed.tensors)
    for part, said in untie(ties, are_one):
        if keep:
            vars(part)[RECORD] = said
    return model


def _made(
    layers: Mapping[str, Adapted], modules: Mapping[str, Whole], chosen: Mixture | None, safe: bool, requantize: bool
) -> _New:
    """Return every new tensor; what does not hold the sum is refused here, while nothing has changed."""
    with torch.inference_mode(False), torch.no_grad():
        merged = {
            name: weights
            for name, layer in layers.items()
            if not isinstance(layer, PartLinear)
            and (weights := _merged(name, layer, chosen, safe, requantize)) is not None
        }
        put = put_together(  # one W' at a time in memory
            (layer, weights[0])
            for name, layer in layers.items()
            if isinstance(layer, PartLinear) and (weights := _merged(name, layer, chosen, safe, requantize)) is not None
        )
        versions = {n: m.mixed(a) for n, m in modules.items() if (a := active_adapters(m, _or(chosen, m)))}
    for name, tensors in versions.items():
        if safe and not all(_finite(t) for t in tensors.values()):
            raise SpectuneError(f"merging into {name!r} gives values that are not finite: the adapter is broken there")
    return _New(merged, put, versions)


def _packed(name: str, layer: Adapted, weight: Tensor) -> nn.Parameter:
    try:
        return packed_again(layer, weight)
    except SpectuneError as error:
        raise SpectuneError(f"the weight of {name!r} cannot be packed again: {error}") from None


def _by_owner(
    layers: Mapping[str, Adapted], held: Mapping[str, Held]
) -> dict[nn.Module, dict[str, tuple[PartLinear, Held]]]:
    """Return the parts among adapted layers, with what each holds, by the module that owns their tensors."""
    owners: dict[nn.Module, dict[str, tuple[PartLinear, Held]]] = {}
    for name, layer in layers.items():
        if isinstance(layer, PartLinear):
            owners.setdefault(layer.owner, {})[name] = layer, held[name]
    return owners


def _put_owned(owner: nn.Module, record: MergedOwner, new: _New, placed: Placed, keep: bool) -> None:
    for key in [key for module, key in new.owned if module is owner]:
        record.before[key], record.now[key] = placed.put(owner, key, new.owned[owner, key])
    if keep:
        vars(owner)[RECORD] = record


def _put_layer(
    name: str,
    layer: Any,
    held: Held,
    new: tuple[Tensor, Tensor | None] | None,
    placed: Placed,
    keep: bool,
) -> None:
    record = MergedLayer(name, layer.weight, layer._parameters.get("bias"), held, vars(layer).get(FRESH))
    if new is not None:
        weight, bias = new
        trains = record.weight.requires_grad
        layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=trains)
        placed.put_weight(record.weight, layer.weight)
        vars(layer).pop(FRESH, None)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=trains)
            placed.tensors.append(layer.bias)
    if keep:
        record.seal(layer)
        vars(layer)[RECORD] = record


def _put_module(module: nn.Module, record: MergedModule, new: Mapping[str, Tensor], placed: Placed, keep: bool) -> None:
    for key, tensor in new.items():
        record.before[key], record.now[key] = placed.put(module, key, tensor.detach())
        vars(module).pop(FRESH, None)
    if keep:
        vars(module)[RECORD] = record


def _or(chosen: Mixture | None, module: Whole) -> Mixture:
    return module.selection.mixture if chosen is None else chosen


def unmerge(model: M) -> M:
    """Give the layers the weights back that they had before `merge`, bit for bit, with their adapters as they were.

    Args:
        model: a model that `merge` was called on, with `keep`.

    Returns:
        The model.

    Raises:
        SpectuneError: nothing was merged or kept, the model was adapted again, or a merged weight was written to.
    """
    owners, layers = records_of(model, MergedOwner), records_of(model, MergedLayer)
    modules = records_of(model, MergedModule)
    if not owners and not layers:
        raise SpectuneError("no merged adapter can be taken out of the model: none was merged, or with keep=False")
    for module, record in (*modules, *layers, *owners):  # all of them, before anything changes
        record.check(module)
    for module, record in (*owners, *layers, *modules):
        del vars(module)[RECORD]
        record.give_back(module)
    _answer_again(model)
    return model


def _answer_again(model: nn.Module) -> None:
    """See to what adapting sees to beside the layers: attention, packed layouts, saving, ties, and what trains."""
    see_to_attention(model)
    keep_layout(model, True)
    watch_saving(model)
    for part in transformers_models(model):
        before: Ties | None = vars(part).pop(RECORD, None)
        if before is not None:
            say_of_ties(part, before)
    there = adapted_layers(model)
    own = {id(p) for part in parts_of(model).values() for p in part.adapters.parameters()}
    for layer in there.values():
        layer.parts(layer.selection.scope_of_model)
    for selection in selections(there):
        selection.freeze(p for p in model.parameters() if id(p) not in own)


def _merged(
    name: str, layer: Adapted, chosen: Mixture | None, safe: bool, requantize: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return the new weight and bias of a layer, or None where no adapter has a part in it."""
    active = active_adapters(layer, layer.selection.mixture if chosen is None else chosen)
    if not active:
        return None
    own = stored_weight(layer)
    if offloading(layer) is not None or (own is not None and own.is_meta):
        raise SpectuneError(
            f"the weight of {name!r} is offloaded and would come back as it was: load the model whole, then merge"
        )
    kind = effective_weight(layer).device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        made = merged_weight(name, layer, active, requantize=requantize), merged_bias(layer, active)
    if safe and not all(_finite(t) for t in made):
        raise SpectuneError(
            f"merging {', '.join(repr(n) for n, _ in active)} into {name!r} gives values that are not finite: the "
            "adapter is broken there; safe=False would merge it all the same"
        )
    return (_packed(name, layer, made[0]), made[1]) if layer.is_packed else made


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_meta or bool(whole(tensor.isfinite().all()))

"""Adapters folded into the weights of their layers, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.attention import see_to_attention
from spectune.layers.merged import active_adapters, merged_bias, merged_weight
from spectune.layers.mixtures import Mixture
from spectune.layers.modules import effective_weight, offloading, stored_weight
from spectune.layers.packed import is_packed, keep_layout, packed_again
from spectune.layers.parts import Owner, PartLinear, put_together
from spectune.layers.selection import Selection
from spectune.layers.shards import whole
from spectune.layers.taking import take_over
from spectune.layers.whole import Whole, parts_of, take_over_whole, whole_modules
from spectune.model.fresh import FRESH, mark_loaded
from spectune.model.install import selections
from spectune.model.lifecycle import detach
from spectune.model.names import M, check_own_weights, check_some_adapter
from spectune.model.routing import Choice, mixture_of
from spectune.model.saving import watch_saving
from spectune.model.ties import Ties, are_one, say_of_ties, tied_pairs, transformers_models, untie

if TYPE_CHECKING:
    from spectune.layers.selection import Selection


_Sums = tuple[torch.dtype, list[tuple[float, float]]]
_RECORD = "spectune_merged"  # an attribute of what merging changed


@dataclass
class _Layer:
    """What a layer was before: its parameters, what it held as an adapted one, and the parameters that it has now."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    parts: dict[str, Any]
    fresh: object
    merged: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None)
    sums: _Sums | None = None


@dataclass
class _Module:
    """What a module that an adapter brought whole was before: its tensors, and its adapters with their selection."""

    name: str
    before: dict[str, Any]
    now: dict[str, Tensor]
    adapters: nn.ModuleDict
    selection: Selection
    fresh: object


@dataclass
class _Owned:
    """What the owner of parts was before: its tensors, and its adapted layers with what they held, by their names."""

    before: dict[str, nn.Parameter]
    now: dict[str, Tensor]
    parts: dict[str, tuple[PartLinear, dict[str, Any]]]


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
    merged: dict[str, tuple[Tensor, Tensor | None]] = {}
    in_parts = {name: layer for name, layer in layers.items() if isinstance(layer, PartLinear)}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            if name not in in_parts and (new_weight := _merged(name, layer, chosen, safe, requantize)) is not None:
                merged[name] = new_weight
        put = put_together(
            (layer, w[0])
            for name, layer in in_parts.items()
            if (w := _merged(name, layer, chosen, safe, requantize)) is not None
        )
        versions = {n: m.mixed(a) for n, m in modules.items() if (a := active_adapters(m, _or(chosen, m)))}
        for name, tensors in versions.items():
            if safe and not all(_finite(t) for t in tensors.values()):
                raise SpectuneError(
                    f"merging into {name!r} gives values that are not finite: the adapter is broken there"
                )
    parts = {name: _parts_of(layer) for name, layer in layers.items()}
    owners: dict[nn.Module, dict[str, tuple[PartLinear, dict[str, Any]]]] = {}
    for name, layer in in_parts.items():
        owners.setdefault(layer.owner, {})[name] = layer, parts[name]
    own = {name: (nn.ModuleDict(dict(module.adapters.items())), module.selection) for name, module in modules.items()}
    ties = tied_pairs(model)
    detach(model)
    made: list[Tensor] = []
    new: dict[int, nn.Parameter] = {}  # by what it replaces, so that what is tied and stays equal is one again
    for module, held in owners.items():
        record = _Owned({}, {}, held)
        for key in [key for owner, key in put if owner is module]:
            record.before[key] = old = module._parameters[key]  # type: ignore[assignment]
            record.now[key] = _put(module, key, put[module, key], old, new)
            made.append(record.now[key])
        if keep:
            vars(module)[_RECORD] = record
    for name, layer in layers.items():
        if name in in_parts:
            continue
        record = _Layer(name, layer.weight, layer._parameters.get("bias"), parts[name], vars(layer).get(FRESH))
        if name in merged:
            weight, bias = merged[name]
            if not isinstance(weight, nn.Parameter):
                weight = nn.Parameter(weight, requires_grad=record.weight.requires_grad)
            layer.weight = weight
            new[id(record.weight)] = layer.weight
            made.append(layer.weight)
            vars(layer).pop(FRESH, None)
            if bias is not None:
                layer.bias = nn.Parameter(bias, requires_grad=record.weight.requires_grad)
                made.append(layer.bias)
        if keep:
            record.merged, record.sums = (layer.weight, layer._parameters.get("bias")), _sums(layer)
            vars(layer)[_RECORD] = record
    for name, module in modules.items():
        record = _Module(name, {}, {}, *own[name], vars(module).get(FRESH))
        for key, tensor in versions.get(name, {}).items():
            record.before[key] = old = module._parameters.get(key, module._buffers.get(key))
            record.now[key] = _put(module, key, tensor.detach(), old, new)
            made.append(record.now[key])
            vars(module).pop(FRESH, None)
        if keep:
            vars(module)[_RECORD] = record
    mark_loaded(model, made)
    for part, said in untie(ties, are_one):
        if keep:
            vars(part)[_RECORD] = said
    return model


def _packed(name: str, layer: Adapted, weight: Tensor) -> nn.Parameter:
    try:
        return packed_again(layer, weight)
    except SpectuneError as error:
        raise SpectuneError(f"the weight of {name!r} cannot be packed again: {error}") from None


def _put(module: nn.Module, key: str, tensor: Tensor, old: Tensor | None, new: dict[int, nn.Parameter]) -> Tensor:
    if key in module._buffers:
        module._buffers[key] = made = tensor.clone()
        return made
    made = new.get(id(old))
    if made is None or made.shape != tensor.shape or not torch.equal(made, tensor):
        made = nn.Parameter(tensor.clone(), requires_grad=old is not None and old.requires_grad)
        new.setdefault(id(old), made)
    module._parameters[key] = made
    return made


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
    records: dict[Any, _Layer] = {m: r for m in model.modules() if isinstance(r := vars(m).get(_RECORD), _Layer)}
    owned: dict[Any, _Owned] = {m: r for m in model.modules() if isinstance(r := vars(m).get(_RECORD), _Owned)}
    if not records and not owned:
        raise SpectuneError("no merged adapter can be taken out of the model: none was merged, or with keep=False")
    brought: dict[nn.Module, _Module] = {
        m: r for m in model.modules() if isinstance(r := vars(m).get(_RECORD), _Module)
    }
    for module, record in brought.items():
        held = {**module._parameters, **module._buffers}
        if isinstance(module, Whole) or any(held[key] is not tensor for key, tensor in record.now.items()):
            raise SpectuneError(f"{record.name!r} is another module now: load the base and attach the adapter instead")
    for layer, record in records.items():
        if isinstance(layer, Adapted):
            raise SpectuneError(f"{record.name!r} was adapted again after merging: detach the newer adapters first")
        if (
            layer.weight is not record.merged[0]
            or layer._parameters.get("bias") is not record.merged[1]
            or _differ(layer, record.sums)
        ):
            raise SpectuneError(
                f"the merged weight of {record.name!r} is another one now: load the base and attach the adapter instead"
            )
    for module, record in owned.items():
        if isinstance(module, Owner) or any(module._parameters[k] is not tensor for k, tensor in record.now.items()):
            raise SpectuneError(
                f"the tensor that {next(iter(record.parts))!r} is a part of is another one now: load the base and "
                "attach the adapter instead"
            )
    for module, record in owned.items():
        for key, tensor in record.before.items():
            tensor.data = tensor.data.to(record.now[key].device)
            module._parameters[key] = tensor
        del vars(module)[_RECORD]
        for name, (layer, parts) in record.parts.items():
            _take_back(layer, name, parts)
    for layer, record in records.items():
        now = layer.weight
        for name, held in (("weight", record.weight), ("bias", record.bias)):
            if held is not None:
                held.data = held.data.to(now.device)
            if name in layer._parameters:
                setattr(layer, name, held)
        del vars(layer)[_RECORD]
        if record.fresh is not None:
            setattr(layer, FRESH, record.fresh)
        _take_back(layer, record.name, record.parts)
    for module, record in brought.items():
        for key, tensor in record.before.items():
            place: dict[str, Any] = module._buffers if key in module._buffers else module._parameters
            tensor.data = tensor.data.to(place[key].device)
            place[key] = tensor
        del vars(module)[_RECORD]
        if record.fresh is not None:
            setattr(module, FRESH, record.fresh)
        take_over_whole(module, record.name, record.selection).adapters = record.adapters
    see_to_attention(model)
    keep_layout(model, True)
    watch_saving(model)
    for part in transformers_models(model):
        before: Ties | None = vars(part).pop(_RECORD, None)
        if before is not None:
            say_of_ties(part, before)
    there = adapted_layers(model)
    own = {id(p) for part in parts_of(model).values() for p in part.adapters.parameters()}
    for layer in there.values():
        layer.parts(layer.selection.scope_of_model)
    for selection in selections(there):
        selection.freeze(p for p in model.parameters() if id(p) not in own)
    return model


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


def _take_back(layer: nn.Module, name: str, held: dict[str, Any]) -> None:
    """Make a layer the adapted one that it was, with what it held."""
    adapted, device = take_over(layer, name, held["selection"]), effective_weight(layer).device
    adapted.adapters, adapted.bases = held["adapters"].to(device), held["bases"].to(device)
    if adapted.selection.mixture != held["mixture"]:
        adapted.selection.mixture = held["mixture"]


def _parts_of(layer: Adapted) -> dict[str, object]:
    """Return what detaching takes from a layer."""
    return {
        "adapters": nn.ModuleDict(dict(layer.adapters.items())),
        "bases": nn.ModuleDict(dict(layer.bases.items())),
        "selection": layer.selection,
        "mixture": layer.selection.mixture,
    }


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_meta or bool(whole(tensor.isfinite().all()))


def _sums(layer: Any) -> _Sums | None:
    """Return what tells whether a layer's parameters are as they were: their sums and sums of sizes.

    Of a packed weight nothing does, whose library lays it out anew as it likes, and which nobody writes to.
    """
    if is_packed(layer):
        return None
    held = [p.detach() for p in (layer.weight, layer._parameters.get("bias")) if p is not None and not p.is_meta]
    sums = [(p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64)) for p in held]
    return layer.weight.dtype, [(float(whole(a)), float(whole(b))) for a, b in sums]


def _differ(layer: object, before: _Sums | None) -> bool:
    now = _sums(layer)
    if now is None or before is None:
        return False
    dtype, sums = now
    near = all(
        abs(a - b) <= 1e-10 * size and abs(s - size) <= 1e-10 * size
        for (a, s), (b, size) in zip(sums, before[1], strict=True)
    )
    return dtype != before[0] or not near

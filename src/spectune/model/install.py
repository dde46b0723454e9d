"""Putting terms on layers: bases, trained tensors and checks first, and the model last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn as nn
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.terms import Term
from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.attention import see_to_attention
from spectune.layers.classes import check_free
from spectune.layers.kinds import kind_of
from spectune.layers.mixtures import Mixture
from spectune.layers.modules import effective_weight, find_linear
from spectune.layers.packed import Packed
from spectune.layers.selection import Selection
from spectune.layers.taking import take_over
from spectune.layers.updates import Basis, Update
from spectune.layers.values import PLAIN, Made, made_of
from spectune.layers.whole import Part, parts_of
from spectune.methods import Method
from spectune.spectral import Request, decompose_each


class Prepared(NamedTuple):
    """What putting an adapter's terms on layers takes, all of it made and checked.

    Args:
        name: the adapter's.
        bases: by layer and key, those that the layers had not.
        updates: by layer.
    """

    name: str
    bases: Mapping[str, Mapping[str, Basis]]
    updates: Mapping[str, list[Update]]


def install(
    model: nn.Module,
    plan: Mapping[str, Sequence[Term]],
    name: str,
    *,
    trained_on: Mapping[str, Tensor | None] | None = None,
    progress: object = None,
    dtype: torch.dtype | Literal["base"] | None = None,
) -> None:
    """Put terms on layers under a name; the model is touched only when nothing can fail any more."""
    put_on(model, prepared(model, plan, name, trained_on=trained_on, progress=progress, dtype=dtype))


def prepared(
    model: nn.Module,
    plan: Mapping[str, Sequence[Term]],
    name: str,
    *,
    trained_on: Mapping[str, Tensor | None] | None = None,
    progress: object = None,
    dtype: torch.dtype | Literal["base"] | None = None,
) -> Prepared:
    """Return what `put_on` needs to put terms on layers; the model is only read, whoever runs it meanwhile."""
    if dtype not in (None, "base") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpectuneError(f"dtype must be a floating-point torch.dtype, 'base' or None, not {dtype!r}")
    layers = {layer_name: find_linear(model, layer_name) for layer_name in plan}
    hooked = any("_hf_hook" in vars(module) for module in model.modules())
    for layer_name, layer in layers.items():
        if hooked and effective_weight(layer).is_meta:
            raise SpectuneError(
                f"the weight of {layer_name!r} is offloaded with the module around it and not at hand: load the model "
                "without offloading this module, or exclude the layer"
            )
        check_layer(layer_name, layer)
        check_free(layer_name, layer, Adapted)
    bases = bases_for(layers, plan, trained_on or {}, progress, dtype_of(model))
    ready: dict[str, list[Update]] = {}
    for layer_name, layer in layers.items():
        weight = effective_weight(layer)
        updates = []
        for term in plan[layer_name]:
            trained = term.trained
            if not trained:
                shapes = term.method.shapes(*weight.shape)
                if weight.is_meta:
                    trained = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
                else:
                    table = (kind := kind_of(layer)) is not None and kind.looks_up
                    start = term.method.initial_of_table if table else term.method.initial
                    trained = start(shapes, _frozen(bases[layer_name], layer, term.method))
                    if term.method.replaces and weight.any():  # a layer that is zero could never learn beside another
                        trained = term.method.whole_layer(weight, layer.bias)  # type: ignore[arg-type]
            held = weight.dtype if dtype == "base" else dtype or master_dtype(weight)
            trained = {k: v.detach().to(weight.device, held, copy=True) for k, v in trained.items()}
            updates.append(Update(term.method, trained, term.weight))
            updates[-1].unmade = weight.is_meta
            updates[-1].needs_basis = type(term.method).basis is not Method.basis
            if term.sketch is not None:
                frozen = _frozen(bases[layer_name], layer, term.method)
                term = replace(term, basis=frozen or None)
                term.check(layer_name, weight.detach(), (trained_on or {}).get(layer_name))
        ready[layer_name] = updates
    return Prepared(name, bases, ready)


def put_on(model: nn.Module, ready: Prepared) -> None:
    """Put on layers what was prepared for them. No adapter may have left the model since then."""
    there = adapted_layers(model)
    shared = selections(there) or [Selection()]
    own = {id(p) for part in parts_of(model).values() for p in part.adapters.parameters()}
    shared[0].freeze(p for p in model.parameters() if id(p) not in own)
    for layer_name, updates in ready.updates.items():
        layer = find_linear(model, layer_name)
        adapted = layer if isinstance(layer, Adapted) else take_over(layer, layer_name, shared[0])
        for key, basis in ready.bases[layer_name].items():
            adapted.bases[key] = basis
        adapted.adapters[ready.name] = nn.ModuleList(updates).train(layer.training)
    see_to_attention(model)
    choose(adapted_layers(model).values(), {ready.name: 1.0})


def bases_for(
    layers: Mapping[str, nn.Module],
    plan: Mapping[str, Sequence[Term]],
    trained_on: Mapping[str, Tensor | None],
    progress: Any,
    around: torch.dtype | None,
) -> dict[str, dict[str, Basis]]:
    """Return the bases that the terms need and the layers have not, by layer and key."""
    bases: dict[str, dict[str, Basis]] = {name: {} for name in layers}
    wanted: defaultdict[Request | None, list[tuple[str, Method]]] = defaultdict(list)
    for name, layer in layers.items():
        if effective_weight(layer).is_meta:
            continue
        for term in plan[name]:
            method = term.method
            if isinstance(layer, Adapted) and method.basis_key in layer.bases and _shares(name, layer, term):
                continue
            if term.basis is not None:
                given = frozen_basis(layer, method, term.basis, around)
                given.made = (
                    Made(None, effective_weight(layer).dtype) if term.stays else made_of(effective_weight(layer))
                )
                bases[name].setdefault(method.basis_key, given)
            elif (name, method) not in wanted[method.request()]:
                wanted[method.request()].append((name, method))
    needed = dict.fromkeys(name for pairs in wanted.values() for name, _ in pairs)
    weights = {n: fingerprint.as_trained(effective_weight(layers[n]).detach(), trained_on.get(n)) for n in needed}
    for request, pairs in wanted.items():
        methods: defaultdict[str, list[Method]] = defaultdict(list)
        for name, method in pairs:
            methods[name].append(method)
        found: Iterable[tuple[str, Any]] = ((name, None) for name in methods)
        if request is not None:
            sources = {name: w.dense if isinstance(w := weights[name], Packed) else w for name in methods}
            found = decompose_each(sources, request, progress=progress)
        # what is kept of a decomposition may be half as large, so that none waits for the others
        for name, decomposition in found:
            for method in methods[name]:
                made = _made_basis(name, layers[name], method, weights[name], decomposition, around)
                if made is not None:
                    bases[name].setdefault(method.basis_key, made)
            del decomposition
    return bases


def _made_basis(
    name: str, layer: nn.Module, method: Method, weight: Tensor, decomposition: Any, around: torch.dtype | None
) -> Basis | None:
    """Return the frozen tensors that a method makes of a layer's weight, if there are any."""
    try:
        frozen = method.basis(weight, decomposition)
    except SpectuneError as error:
        raise SpectuneError(f"{name!r} cannot be adapted: {error}") from None
    if not frozen:
        return None
    made = frozen_basis(layer, method, frozen, around)
    made.made = made_of(effective_weight(layer))
    return made


def _shares(name: str, layer: Adapted, term: Term) -> bool:
    """Whether a term goes through the frozen tensors that are on a layer already.

    Raises:
        SpectuneError: these were made of another W than is there now, and adapters that are there go through them.
    """
    if layer.owns(term.method.basis_key, once=True) or term.sketch is not None:  # by which they are compared
        return True
    if term.method.request() is not None:
        raise SpectuneError(
            f"the weight of {name!r} is another one than when the adapters there were put on it, and "
            f"{term.method.name} would go through the singular vectors of the old one: detach them first"
        )
    return False


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return what a model with packed weights computes in, which these do not tell."""
    plain = (p.dtype for p in model.parameters() if type(p) in PLAIN and p.is_floating_point())
    return next(plain, None)


def frozen_basis(
    layer: nn.Module, method: Method, tensors: Mapping[str, Tensor], around: torch.dtype | None = None
) -> Basis:
    """Move frozen tensors to a layer: in its dtype where they are large (the core alone trains), else float32.

    Args:
        layer: the layer.
        method: whose they are.
        tensors: the tensors.
        around: the dtype of a packed weight's model.
    """
    weight = effective_weight(layer)
    master = master_dtype(weight)
    own = around or weight.dtype if isinstance(weight, Packed) else weight.dtype

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(weight.device)
        if tensor.dim() < 2:  # a part of the cache's file would hold all of it in memory
            return tensor.to(weight.device, master, copy=True)
        return tensor.to(weight.device, own if method.core_only else master)

    return Basis({key: moved(tensor) for key, tensor in tensors.items()})


def _frozen(new: Mapping[str, Basis], layer: nn.Module, method: Method) -> dict[str, Tensor]:
    if method.basis_key in new:
        return new[method.basis_key].tensors()
    if isinstance(layer, Adapted) and method.basis_key in layer.bases:
        return cast(Basis, layer.bases[method.basis_key]).tensors()
    return {}


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise unless a layer's weight is floating point, of 16 bits or more, and finite."""
    weight = effective_weight(layer)
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise SpectuneError(
            f"the weight of {name!r} is {weight.dtype}, not a float of 16 bits or more, nor packed in a way "
            "that is known (bitsandbytes, torchao, quanto): load the model in fp32, bf16 or fp16, or exclude the layer"
        )
    if not weight.is_meta and not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
        raise SpectuneError(f"the weight of {name!r} holds values that are not finite; repair the checkpoint")


def selections(layers: Mapping[str, Part]) -> list[Selection]:
    """Return what adapted layers share: one object, or several where parts of the model were adapted apart."""
    return list({id(layer.selection): layer.selection for layer in layers.values()}.values())


def choose(layers: Iterable[Part], mixture: Mixture) -> None:
    """Set what answers every row, in every thread, and have each layer ready for it."""
    layers = list(layers)
    for selection in {layer.selection for layer in layers}:
        selection.mixture = mixture
    for layer in layers:
        if isinstance(layer, Adapted):
            layer.parts(layer.selection.scope_of_model)


def master_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that an update is held in: float32, or float64 beside a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)

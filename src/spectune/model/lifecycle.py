"""Adapters leave a model: extracted, detached, or merged into its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.adapters.terms import LayerUpdate, Term
from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers, give_back
from spectune.layers.mixtures import weight_at
from spectune.layers.modules import effective_weight, is_conv1d
from spectune.layers.shards import is_part, whole
from spectune.model.install import master_dtype, selections
from spectune.model.names import M, check_known_on, check_some_adapter, method_of, updates_of
from spectune.model.targets import FRESH


def extract(model: nn.Module, name: str = "default") -> Adapter:
    """Return an adapter that is on a model as an `Adapter` of its own, on the CPU.

    Where FSDP2 has sharded the model every process must call it, and the adapter holds neither W nor a basis.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    check_known_on(model, name)
    layers = {}
    for layer_name, layer in adapted_layers(model).items():
        if name not in layer.adapters:
            continue
        terms = []
        for update in updates_of(layer, name):
            trained = {k: whole(v).cpu().float().clone() for k, v in update.trained().items()}
            frozen = {k: whole(v) for k, v in layer.tensors(update).items() if k not in trained}
            terms.append(Term(method_of(update), trained, update.weight, frozen or None))
        weight = effective_weight(layer)
        extracted = LayerUpdate(tuple(weight.shape), tuple(terms), is_conv1d(layer), weight)  # type: ignore[arg-type]
        layers[layer_name] = extracted.sealed() if is_part(weight) else extracted
    config: Any = getattr(model, "config", None)
    brings_head = any(t.method.replaces for layer in layers.values() for t in layer.terms)
    names = getattr(config, "id2label", None) if brings_head else None
    labels = [str(names[i]) for i in sorted(names)] if names else None
    return Adapter(layers, getattr(config, "_name_or_path", None) or None, labels=labels)


def detach(model: M, name: str | None = None) -> M:
    """Take an adapter, or all of them, off a model; with the last one gone its layers are what they were before.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    if name is not None:
        check_known_on(model, name)
    shared = selections(adapted_layers(model))
    for layer in adapted_layers(model).values():
        for gone in [n for n in layer.adapters if name in (None, n)]:
            del layer.adapters[gone]
        used = {update.basis_key for n in layer.adapters for update in updates_of(layer, n)}
        for key in layer.bases.keys() - used:
            del layer.bases[key]
        if not layer.adapters:
            give_back(layer)
    left = adapted_layers(model).values()
    in_use = {id(layer.selection) for layer in left}
    for selection in shared:
        selection.mixture = {n: w for n, w in selection.mixture.items() if name not in (None, n)}
        if id(selection) not in in_use:
            for parameter in selection.frozen:
                parameter.requires_grad_(True)
    for layer in left:
        layer.parts(layer.selection.scope_of_model)
    return model


def merge(model: M) -> M:
    """Fold what answers now into new weights, and take every adapter off: plain layers again.

    Tied weights stay tied unless an adapter is on one of them.

    Raises:
        SpectuneError: no adapter is on the model, or a layer's weight cannot hold the sum.
    """
    layers = adapted_layers(model)
    check_some_adapter(layers)
    merged = {}
    for name, layer in layers.items():
        active = [(n, float(w)) for n in layer.adapters if (w := weight_at(layer.selection.mixture, n, layer))]
        if active:
            merged[name] = _merged_weight(name, layer, active), _merged_bias(layer, active)
    detach(model)
    tied = _tied(model)
    for name, (weight, bias) in merged.items():
        layer = model.get_submodule(name)
        old: Any = layer.weight
        if id(old) in tied and hasattr(model, "config"):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        vars(layer).pop(FRESH, None)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
    return model


def _merged_weight(layer_name: str, layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor:
    weight = effective_weight(layer).detach()
    if not weight.is_floating_point():
        raise SpectuneError(
            f"the weight of {layer_name!r} is {weight.dtype} and cannot hold a merged update: dequantize the model "
            "first, or keep the adapter beside it"
        )
    master = master_dtype(weight)
    total = weight.to(master)
    for name, factor in active:
        for update in updates_of(layer, name):
            tensors = {
                k: v.detach().to(master) if v.is_floating_point() else v for k, v in layer.tensors(update).items()
            }
            total = total + factor * update.weight * update.method.delta(tensors, weight.to(master))
    total = total.to(weight.dtype)
    return total.T.contiguous() if is_conv1d(layer) else total


def _merged_bias(layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor | None:
    """Return the layer's new bias, or None where no update has one."""
    own, total = layer.bias, None
    for name, factor in active:
        for update in updates_of(layer, name):
            bias = update.method.bias_of(update.trained())
            if bias is not None:
                start = torch.zeros_like(bias) if own is None else own.detach().to(bias.dtype)
                total = (start if total is None else total) + factor * update.weight * (bias.detach() - start)
    return total if total is None else total.to(layer.weight.dtype)


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules share."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, count in owners.items() if count > 1}

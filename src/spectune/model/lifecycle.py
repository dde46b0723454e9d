"""Adapters leave a model: extracted as they are, or detached."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from spectune.adapters.adapter import Adapter
from spectune.adapters.terms import LayerUpdate, Term
from spectune.layers.adapted import adapted_layers, give_back
from spectune.layers.modules import effective_weight, is_conv1d
from spectune.layers.shards import is_part, whole
from spectune.model.install import selections
from spectune.model.names import M, check_known_on, check_own_weights, method_of, updates_of


def extract(model: nn.Module, name: str = "default") -> Adapter:
    """Return an adapter that is on a model as an `Adapter` of its own, on the CPU.

    Where FSDP2 has sharded the model every process must call it, and the adapter holds neither W nor a basis.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    check_known_on(model, name)
    check_own_weights(adapted_layers(model))
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
    check_own_weights(adapted_layers(model))
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
        if id(selection) not in in_use:  # layers elsewhere that share it keep frozen what is not in this model
            mine = None if not selection.users else {id(p) for p in model.parameters()}
            for parameter in selection.frozen:
                if mine is None or id(parameter) in mine:
                    parameter.requires_grad_(True)
    for layer in left:
        layer.parts(layer.selection.scope_of_model)
    return model

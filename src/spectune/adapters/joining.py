"""LoRAs of the projections in a fused layer as one LoRA of that layer, for formats that know no parts of one."""

from __future__ import annotations

from collections import defaultdict

import torch

from spectune.adapters.contents import Contents
from spectune.adapters.terms import LayerUpdate, lora_term
from spectune.errors import SpectuneError
from spectune.layers.attention import IN
from spectune.methods.lora import LoRA


def joined(adapter: Contents) -> Contents:
    """Return an adapter in which the LoRAs of a fused layer's projections are one: A on A, B where their rows are.

    The rank is the sum of theirs, and dW the same to the last bit but for the order of sums.

    Raises:
        SpectuneError: a projection has something else than one LoRA, such as DoRA.
    """
    parts: defaultdict[str, dict[str, LayerUpdate]] = defaultdict(dict)
    layers: dict[str, LayerUpdate] = {}
    for name, layer in adapter.layers.items():
        if layer.rows is None:
            layers[name] = layer
        else:
            fused = name.rpartition(".")[0]
            parts[fused][name] = layers[fused] = layer  # in the place of the first of them
    if not parts:
        return adapter
    layers |= {fused: _one(own) for fused, own in parts.items()}
    kept = adapter.labels, adapter.modules, adapter.architecture, adapter.groups, adapter.quantize
    return Contents(layers, adapter.base_model, adapter.error, *kept)


def _one(parts: dict[str, LayerUpdate]) -> LayerUpdate:
    down, up = [], []
    for name, layer in parts.items():
        (term,) = layer.terms
        rows, method = layer.rows, term.method
        assert rows is not None
        if not isinstance(method, LoRA) or layer.kind == IN:
            raise SpectuneError(
                f"{name!r} is a part of a fused layer, which formats of others know as one, and has {method.name}: "
                "save it with adapter.save(folder), or merge it into the model"
            )
        B = term.trained["B"] * (term.weight * method.scale)
        whole = B.new_zeros(rows.groups * rows.period, B.shape[1])
        rows.put(whole, B)
        up.append(whole)
        down.append(term.trained["A"])
    A, B = torch.cat(down), torch.cat(up, 1)
    first = next(iter(parts.values()))
    return LayerUpdate((len(B), A.shape[1]), (lora_term(B, A),), first.conv1d)

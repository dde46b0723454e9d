"""What methods store on a model: the files of an adapter, the frozen tensors, and KerasHub's count of LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spectune.adapters import fingerprint
from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import folder_sizes
from spectune.adapters.formats.choose import contents
from spectune.adapters.terms import LayerUpdate, Term, needs_basis
from spectune.errors import SpectuneError
from spectune.layers.experts import ExpertLinear
from spectune.layers.modules import described, effective_weight, find_linear, is_stored_transposed
from spectune.methods import Method
from spectune.model.install import frozen_basis
from spectune.model.wanted import groups_of
from spectune.model.whole import labels_of
from spectune.spectral._types import empty_decomposition

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def keras_lora_parameters(config: PreTrainedConfig, rank: int) -> int:
    """Count what KerasHub's `enable_lora(rank)` trains: A of (heads, in, rank) and B of (rank, head) a projection.

    Raises:
        SpectuneError: the config does not say how many heads there are.
    """
    try:
        heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    except AttributeError:
        raise SpectuneError(f"keras_lora needs a transformer's config, not one of type {config.model_type!r}") from None
    values = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    return layers * sum(n * hidden * rank + rank * head for n in (heads, values))


def bases_bytes(model: nn.Module, methods: Mapping[str, Method], dtype: torch.dtype) -> int:
    """Return the bytes of the methods' frozen tensors; what layers share counts once."""
    held: dict[int, Tensor] = {}
    each: dict[object, int] = {}
    total = 0
    model.to(dtype)
    try:
        for name, method in methods.items():
            layer = find_linear(model, name)
            weight = effective_weight(layer)
            key = (method, weight.shape)
            if key not in each:
                each[key] = 0
                twice = [_frozen(layer, method) for _ in range(2)]
                for tensor, again in zip(twice[0].values(), twice[1].values(), strict=True):
                    size = tensor.numel() * tensor.element_size()
                    if tensor is again:
                        total += 0 if id(tensor) in held else size
                        held[id(tensor)] = tensor
                    else:
                        each[key] += size
            total += each[key]
    finally:
        model.to(torch.float32)
    return total


def _frozen(layer: nn.Module, method: Method) -> dict[str, Tensor]:
    weight = effective_weight(layer)
    decomposition = empty_decomposition(method.request(), *weight.shape)
    return frozen_basis(layer, method, method.basis(weight, decomposition)).tensors()


def adapter_sizes(model: nn.Module, methods: Mapping[str, Method], base: str | None = None) -> tuple[int, int]:
    """Return the bytes of the two files that `Adapter.save` writes for methods by layer: weights and config.

    Args:
        model: on the meta device.
        methods: the method of each layer.
        base: the base model's name, which the config holds.
    """

    def blank(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    layers = {}
    for name, method in methods.items():
        layer = find_linear(model, name)
        out_features, in_features = effective_weight(layer).shape
        trained = {key: blank(*shape) for key, shape in method.shapes(out_features, in_features).items()}
        frozen, sketch = ({}, blank(*fingerprint.UPDATE_SHAPE)) if needs_basis(method) else (None, None)
        term = Term(method, trained, basis=frozen, sketch=sketch)
        of_base = blank(*fingerprint.WEIGHT_SHAPE)
        count = layer.count if isinstance(layer, ExpertLinear) else 0
        shape = out_features, in_features
        kind, kernel = described(layer)
        layers[name] = LayerUpdate(
            shape, (term,), is_stored_transposed(layer), None, of_base, count, kind=kind, kernel=kernel
        )
    heads = [name for name, method in methods.items() if method.replaces]
    planned = Adapter(
        layers,
        base,
        labels=labels_of(model) if heads else None,
        architecture=(type(model).__name__, type(model).__module__),
        groups=groups_of(model, heads),
    )
    return folder_sizes(*contents(planned))

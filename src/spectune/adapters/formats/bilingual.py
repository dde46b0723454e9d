"""Spectune's folders in PEFT's words: one config and one set of names that both read, without a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.formats.dialect import PREFIX, options_of, prefix_of, type_for, type_of
from spectune.adapters.formats.peft import auto_mapping, grouped, targets_of
from spectune.adapters.formats.peft_reading import TOKENS, rows_of
from spectune.adapters.terms import ADDED_BIAS
from spectune.errors import SpectuneError
from spectune.layers.attention import IN
from spectune.methods.adalora import AdaLoRA
from spectune.reading import parsed

if TYPE_CHECKING:
    from spectune.adapters.schema import AdapterConfig, WholeEntry

_HEAD = {"weight": "H", "bias": "h"}  # a linear layer's tensors, and what they are called in a head
_INSIDE = ".base_layer"  # how PEFT names a layer inside of its own
_SCORES = ("step", "kept", "sensitivity_", "uncertainty_")  # AdaLoRA's, for who trains on in PEFT
VERSION = 2


def in_peft_words(
    config: dict[str, object], tensors: dict[str, Tensor], adapter: Contents
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the config and the tensors so that PEFT reads them too, where one of its configs can say what they are."""
    kind = peft_type(adapter)
    if kind is None:
        return config, tensors
    renamed: dict[str, Tensor] = {}
    whole = [name for name, layer in adapter.layers.items() if layer.terms[0].method.replaces]
    rest = dict(tensors)
    for name, layer in adapter.layers.items():
        (term,) = layer.terms
        if term.method.replaces:
            for key, own in _HEAD.items():
                tensor = rest.pop(f"{name}.0.{own}", None)
                if tensor is not None:
                    renamed[f"{PREFIX}{name}.{key}"] = tensor.T if key == "weight" and layer.conv1d else tensor
            continue
        parts = {"base": f"{name}.base", "sketch": f"{name}.0.sketch"}
        parts |= {key: f"{name}.0.{key}" for key in term.trained}
        parts |= {f"basis_{key}": f"{name}.0.basis.{key}" for key in term.basis or ()}
        for part, key in parts.items():
            if key in rest:
                renamed[f"{PREFIX}{name}.{prefix_of(kind)}{part}"] = rest.pop(key)
    for name, (whole_term,) in adapter.modules.items():
        whole.append(name)
        for key in whole_term.tensors:
            renamed[f"{PREFIX}{name}.{key}"] = rest.pop(f"{name}.0.whole.{key}")
    methods = [layer.terms[0].method for layer in adapter.layers.values() if not layer.terms[0].method.replaces]
    modules = [n for n, layer in adapter.layers.items() if n not in whole and not layer.experts]
    experts = sorted({_tensor_of(n) for n, layer in adapter.layers.items() if layer.experts})
    header = {
        "peft_type": kind,
        "task_type": None if adapter.architecture or not adapter.labels else "SEQ_CLS",
        "auto_mapping": auto_mapping(adapter),
        "inference_mode": True,
        "target_modules": targets_of(modules) if modules else [],
        **({"target_parameters": experts} if experts else {}),
        "modules_to_save": grouped(whole, adapter.groups) or None,
        **options_of(Counter(methods).most_common(1)[0][0]),
    }
    return {**config, "format_version": VERSION, **header}, {**renamed, **rest}


def peft_type(adapter: Contents) -> str | None:
    """Return the PEFT type that can hold an adapter, or None."""
    kinds: set[str | None] = set()
    for layer in adapter.layers.values():
        (term, *more) = layer.terms
        if more or term.weight != 1.0 or term.stays or layer.rows is not None or layer.kind == IN:
            return None
        if not layer.terms[0].method.replaces:
            kinds.add(type_of(layer.terms[0].method))
    for name, parts in adapter.modules.items():
        plain = len(parts) == 1 and parts[0].weight == 1.0 and parts[0].rows is None and parts[0].complete
        if not plain or ADDED_BIAS in parts[0].tensors or name in adapter.layers:
            return None
    return kinds.pop() if len(kinds) == 1 and not _some_of_them(adapter) else None


def _tensor_of(expert: str) -> str:
    """Return the name of the tensor that an expert's weight is a part of."""
    module, _, key = expert.rpartition(".")
    return f"{module.rpartition('.')[0]}.{key}"


def _some_of_them(adapter: Contents) -> bool:
    """Whether an adapter is on some of the experts of a tensor alone."""
    counts = Counter(_tensor_of(name) for name, layer in adapter.layers.items() if layer.experts)
    return any(layer.experts not in (0, counts[_tensor_of(name)]) for name, layer in adapter.layers.items())


def own_names(
    tensors: Mapping[str, Tensor], found: Mapping[str, object], config: AdapterConfig, where: Path
) -> tuple[dict[str, Tensor], dict[str, list[WholeEntry]]]:
    """Return the tensors by Spectune's names, and the config's modules with those that PEFT saved whole."""
    from spectune.adapters.schema import TokenRows, WholeEntry  # pydantic, which adapters on a model go without

    prefix = prefix_of(str(found.get("peft_type")))
    scored = found.get("peft_type") == type_for(AdaLoRA)
    layers, modules = config.layers, {**(config.modules or {})}
    renamed: dict[str, Tensor] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        owner, _, part = key.removeprefix(PREFIX).rpartition(".")
        if part.startswith(prefix):
            part = part.removeprefix(prefix)
            if part in ("base", "sketch") and not tensor.any():
                continue  # PEFT saved a model whose weights were not at hand
            if scored and part.startswith(_SCORES):
                continue
            part = "base" if part == "base" else f"0.{part.replace('basis_', 'basis.')}"
            renamed[f"{owner}.{part}"] = tensor
        elif owner in layers and part in _HEAD:
            turned = part == "weight" and layers[owner].conv1d
            renamed[f"{owner}.0.{_HEAD[part]}"] = tensor.T.contiguous() if turned else tensor
        elif not (owner.endswith(_INSIDE) and owner.removesuffix(_INSIDE) in layers and part == "weight"):
            saved.setdefault(owner.removesuffix(_INSIDE), {})[part] = tensor
    for name, parts in saved.items():
        rows = None
        if TOKENS.rpartition(".")[2] in parts and name.endswith(f".{TOKENS.partition('.')[0]}"):
            name = name.removesuffix(f".{TOKENS.partition('.')[0]}")
            given = rows_of(name, parsed(TokenRows, found, str(where)), where)
            order = sorted(range(len(given)), key=given.__getitem__)
            rows = [given[i] for i in order]
            values, *more = parts.values()
            if more or values.dim() != 2:
                raise SpectuneError(f"the weights beside {where} hold something else than rows of {name!r}")
            parts = {"weight": values[order] if len(order) == len(values) else values}
        renamed |= {f"{name}.0.whole.{key}": tensor for key, tensor in parts.items()}
        complete = rows is None and parts.keys() != {"bias"}
        modules.setdefault(name, [WholeEntry(weight=1.0, tensors=sorted(parts), rows=rows, complete=complete)])
    return renamed, modules

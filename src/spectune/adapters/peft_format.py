"""PEFT's adapter format: LoRA and DoRA both ways, AdaLoRA and converted PiSSA in."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spectune.adapters.adapter import Adapter, LayerUpdate, Term
from spectune.adapters.files import WEIGHTS, read_config, read_tensors, write_folder
from spectune.errors import SpectuneError
from spectune.methods.base import Method
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA

_PREFIX = "base_model.model."
_TENSORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_A": "A",
    "lora_B": "B",
    "lora_E": "E",
    "ranknum": "ranknum",
}


def is_peft(adapter: Adapter) -> bool:
    """Whether PEFT's LoRA format holds the adapter as it is."""
    methods = [term.method for layer in adapter.layers.values() for term in layer.terms]
    plain = all(len(layer.terms) == 1 and layer.terms[0].weight == 1.0 for layer in adapter.layers.values())
    shared = {(isinstance(m, DoRA), _lora(m).rslora, _lora(m).dropout) for m in methods if _is_lora(m)}
    return plain and bool(methods) and all(map(_is_lora, methods)) and len(shared) == 1


def _is_lora(method: Method) -> bool:
    return isinstance(method, LoRA) or (isinstance(method, DoRA) and isinstance(method.inner, LoRA))


def _lora(method: Any) -> LoRA:
    return method.inner if isinstance(method, DoRA) else method


def save_peft(adapter: Adapter, path: Path) -> Path:
    """Write an adapter for which `is_peft` holds, key for key as PEFT writes it."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in adapter.layers.items():
        (term,) = layer.terms
        lora = _lora(term.method)
        ranks[name], alphas[name] = lora.rank, lora.alpha
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = term.trained["A"]
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = term.trained["B"]
        if "magnitude" in term.trained:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = term.trained["magnitude"]
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    method = next(iter(adapter.layers.values())).terms[0].method
    config = {
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": any(layer.conv1d for layer in adapter.layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _lora(method).dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "revision": None,
        "target_modules": sorted(adapter.layers),
        "task_type": None,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": _lora(method).rslora,
    }
    return write_folder(path, config, tensors)


def load_peft(path: Path) -> Adapter:
    """See `Adapter.from_peft`."""
    config = read_config(path)
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise SpectuneError(f"{path} is a PEFT adapter of type {kind!r}; LORA and ADALORA can be read")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "corda", "olora", "loftq")):
        raise SpectuneError(
            f"{path} was saved by PEFT with init_lora_weights={start!r} and without conversion, so that it only works on "
            "a base that PEFT changed; save it with path_initial_model_for_weight_conversion and load that"
        )
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise SpectuneError(f"{path} also trains biases or whole modules, which an adapter here does not hold")
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        name, part = _split(key, path)
        grouped.setdefault(name, {})[part] = tensor
    layers = {name: _layer(name, parts, config, kind == "ADALORA", path) for name, parts in grouped.items()}
    if not layers:
        raise SpectuneError(f"{path / WEIGHTS} has no tensors")
    return Adapter(layers, config.get("base_model_name_or_path"))


def _split(key: str, path: Path) -> tuple[str, str]:
    bare = key.removeprefix(_PREFIX)
    for suffix, part in _TENSORS.items():
        if bare.endswith(f".{suffix}"):
            return bare.removesuffix(f".{suffix}"), part
    raise SpectuneError(f"{path / WEIGHTS} has the tensor {key!r}, which belongs to no linear layer's LoRA")


def _layer(name: str, parts: dict[str, Tensor], config: Mapping[str, Any], ada: bool, path: Path) -> LayerUpdate:
    for needed in ("A", "B"):
        if needed not in parts:
            raise SpectuneError(f"{path / WEIGHTS} lacks lora_{needed} of {name!r}")
    A, B = parts["A"].float(), parts["B"].float()
    rank = A.shape[0]
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != rank:
        raise SpectuneError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of {name!r} do not fit each other")
    alpha = _pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    if ada:
        ranknum = float(parts["ranknum"]) if "ranknum" in parts else float(config["init_r"])
        scale = alpha / (ranknum + 1e-5)
        trained = {"A": A, "B": B * parts["E"].float().reshape(1, -1) * scale}
        method: Method = LoRA(rank=rank, alpha=rank)
    else:
        rslora = bool(config.get("use_rslora", False))
        declared = _pattern(config.get("rank_pattern") or {}, name, config["r"])
        if declared != rank:
            scale = alpha / (math.sqrt(declared) if rslora else declared)
            alpha = scale * (math.sqrt(rank) if rslora else rank)
        method = LoRA(rank=rank, alpha=alpha, rslora=rslora, dropout=float(config.get("lora_dropout") or 0.0))
        trained = {"A": A, "B": B}
        if "magnitude" in parts:
            trained = {"magnitude": parts["magnitude"].float().flatten(), **trained}
            method = DoRA(method)
    shape = (B.shape[0], A.shape[1])
    return LayerUpdate(shape, (Term(method, trained),), conv1d=bool(config.get("fan_in_fan_out", False)))


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of a module's name, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default

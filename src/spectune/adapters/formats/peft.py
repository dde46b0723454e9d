"""Adapters in PEFT's format, as PEFT writes LoRA and DoRA; `peft_reading` takes AdaLoRA and converted PiSSA too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.folder import write_folder
from spectune.adapters.formats import peft_experts, peft_kinds
from spectune.adapters.formats.dialect import PREFIX
from spectune.adapters.formats.peft_reading import TOKENS, load_peft, lora_of
from spectune.adapters.metadata import as_metadata
from spectune.adapters.terms import ADDED_BIAS, WholeTerm
from spectune.errors import SpectuneError
from spectune.methods.base import Method
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA


def is_peft(adapter: Contents) -> bool:
    """Whether PEFT's LoRA format holds the adapter as it is."""
    return _obstacle(adapter) is None


def _obstacle(adapter: Contents) -> str | None:
    """Return what PEFT's LoRA format cannot hold of an adapter, or None."""
    terms = [term for layer in adapter.layers.values() for term in layer.terms]
    alone = len(terms) == len(adapter.layers) and all(term.weight == 1.0 for term in terms)
    updates = [term for term in terms if not term.method.replaces]
    if not updates or not alone or not all(_is_lora(term.method) for term in updates):
        return "layers that are no LoRA"
    kinds = {(isinstance(t.method, DoRA), lora_of(t.method).rslora, lora_of(t.method).dropout) for t in updates}
    if len(kinds) != 1:
        return "LoRAs of several kinds"
    ((dora, *_),) = kinds
    adapted = {name for name, layer in adapter.layers.items() if not layer.terms[0].method.replaces}
    for name, parts in adapter.modules.items():
        term = parts[0]
        added = ADDED_BIAS in term.tensors
        if len(parts) > 1 or term.weight != 1.0:
            return f"a sum of whole modules, {name!r}"
        if added and (name not in adapted or dora):
            return f"a bias that {name!r} has not"
        if term.rows is None and not term.complete and term.tensors.keys() not in ({"bias"}, {ADDED_BIAS}):
            return f"a part of {name!r}"
    if any(layer.rows is not None for layer in adapter.layers.values()):
        return "parts of a fused layer"
    return peft_experts.obstacle(adapter) or peft_kinds.obstacle(adapter.layers)


def _is_lora(method: Method) -> bool:
    return isinstance(method, LoRA) or (isinstance(method, DoRA) and isinstance(method.inner, LoRA))


def save_peft(adapter: Contents, path: Path) -> Path:
    """Write an adapter for which `is_peft` holds, key for key as PEFT writes it.

    Raises:
        SpectuneError: PEFT's format cannot hold it.
    """
    return write_folder(path, *peft_contents(adapter), read=load_peft)


def peft_contents(adapter: Contents) -> tuple[dict[str, object], dict[str, Tensor], dict[str, str]]:
    """Return the config, the tensors and the metadata that `save_peft` writes."""
    obstacle = _obstacle(adapter)
    if obstacle is not None:
        raise SpectuneError(f"PEFT's format cannot hold {obstacle}; save the adapter with adapter.save(path)")
    found = _Collected(adapter)
    found.take_layers()
    found.take_modules()
    found.take_added_biases()
    own = list(found.ranks)
    stacks = found.take_experts()
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (found.ranks, found.alphas))
    updated = [name for name, layer in adapter.layers.items() if not layer.terms[0].method.replaces]
    method = adapter.layers[updated[0]].terms[0].method
    biases = found.biases
    config = {
        "alpha_pattern": {_whole(n): a for n, a in found.alphas.items() if a != alpha},
        "auto_mapping": auto_mapping(adapter),
        "base_model_name_or_path": adapter.base_model,
        "bias": "none" if not biases else "lora_only" if set(biases) <= found.ranks.keys() else "all",
        "fan_in_fan_out": any(adapter.layers[name].conv1d for name in own),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": bool(found.added),
        "lora_dropout": lora_of(method).dropout,
        "modules_to_save": grouped(found.whole, adapter.groups) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_whole(n): r for n, r in found.ranks.items() if r != rank},
        "revision": None,
        "target_modules": targets_of(own),
        **({"target_parameters": sorted(stacks)} if stacks else {}),
        "task_type": None if adapter.architecture or not adapter.labels else "SEQ_CLS",
        "trainable_token_indices": found.rows or None,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": lora_of(method).rslora,
    }
    sketches = {name: sketch for name in updated if (sketch := adapter.base_sketch(name)) is not None}
    return config, found.tensors, as_metadata(adapter.labels, adapter.architecture, sketches, adapter.quantize)


class _Collected:
    """An adapter's tensors by PEFT's names, and what its config has to say of each module.

    Args:
        adapter: one for which `is_peft` holds.
    """

    def __init__(self, adapter: Contents) -> None:
        self._adapter = adapter
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.whole: list[str] = []  # modules to save
        self.biases: list[str] = []  # modules whose bias is trained, and nothing else
        self.rows: dict[str, list[int]] = {}  # of embeddings
        self.added = {n: parts[0].tensors[ADDED_BIAS] for n, parts in adapter.modules.items() if _adds(parts[0])}

    def _put(self, name: str, key: str, tensor: Tensor) -> None:
        self.tensors[f"{PREFIX}{name}.{key}"] = tensor

    def take_layers(self) -> None:
        """Take the factors of layers, and heads; experts come by themselves."""
        for name, layer in self._adapter.layers.items():
            (term,) = layer.terms
            if layer.experts:
                continue
            if term.method.replaces:
                self.whole.append(name)
                self._put(name, "weight", term.trained["H"].T if layer.conv1d else term.trained["H"])
                if "h" in term.trained:
                    self._put(name, "bias", term.trained["h"])
                continue
            lora = lora_of(term.method)
            self.ranks[name], self.alphas[name] = lora.rank, lora.alpha
            for key, tensor in peft_kinds.named(layer, term.trained).items():
                self._put(name, key, tensor)

    def take_modules(self) -> None:
        """Take what came whole, rows of embeddings, and biases."""
        for name, (term, *_) in self._adapter.modules.items():
            if term.rows is not None:
                if not _is_tied(name, term, self._adapter):
                    self.rows[name] = list(term.rows)
                    self._put(name, TOKENS, term.tensors["weight"])
            elif term.complete and name not in self.ranks:
                self.whole.append(name)
                for key, tensor in term.tensors.items():
                    self._put(name, key, tensor)
            elif not _adds(term):
                self.biases.append(name)
                self._put(f"{name}.base_layer" if name in self.ranks else name, "bias", term.tensors["bias"])

    def take_added_biases(self) -> None:
        """Take biases that layers had none of: PEFT multiplies them by the scale, and wants one of every layer."""
        for name in self.ranks if self.added else ():
            term = self._adapter.layers[name].terms[0]
            B, scale = term.trained["B"], lora_of(term.method).scale
            self._put(name, "lora_B.bias", self.added[name] / scale if name in self.added else B.new_zeros(len(B)))

    def take_experts(self) -> dict[str, peft_experts.Stack]:
        """Take the factors of experts, those of one tensor together, and return them by PEFT's name for the tensor."""
        stacks = peft_experts.stacks(self._adapter)
        for name, stack in stacks.items():
            self.ranks[name], self.alphas[name] = stack.rank, stack.alpha
            self._put(stack.module, "lora_A.weight", stack.A)
            self._put(stack.module, "lora_B.weight", stack.B)
        return stacks


def _adds(term: WholeTerm) -> bool:
    return ADDED_BIAS in term.tensors


def _is_tied(name: str, term: WholeTerm, adapter: Contents) -> bool:
    """Whether rows are those of an earlier module, which PEFT sees to where the base ties the two."""
    for other, parts in adapter.modules.items():
        if other == name:
            return False
        if parts[0].rows == term.rows and torch.equal(parts[0].tensors["weight"], term.tensors["weight"]):
            return True
    return False


def auto_mapping(adapter: Contents) -> dict[str, str] | None:
    """Return what tells PEFT's AutoPeftModel classes, with no task type, which class to load the base with."""
    if adapter.architecture is None:
        return None
    return dict(zip(("base_model_class", "parent_library"), adapter.architecture, strict=True))


def grouped(names: list[str], groups: Sequence[str]) -> list[str]:
    """Return the names of modules, those inside one that is brought as a whole by its name."""
    outer = [next((g for g in groups if name == g or name.startswith(f"{g}.")), name) for name in names]
    return list(dict.fromkeys(outer))


def _whole(name: str) -> str:
    """Return the pattern that PEFT matches with this module alone: a bare name would match every suffix."""
    return f"^{re.escape(name)}"


def targets_of(names: list[str]) -> list[str] | str:
    """Return `target_modules`: the names, or a regex where PEFT would take one of them for a suffix of other modules.

    A name with a dot in it is specific enough; one at the top of the model, such as "0", is not.
    """
    return sorted(names) if all("." in name for name in names) else "|".join(map(re.escape, sorted(names)))

"""What a model has that its checkpoint had not: new heads, and rows of embeddings for new tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from logging import getLogger
from pathlib import Path
from typing import Any

import torch.nn as nn
from safetensors import SafetensorError
from transformers.utils import cached_file

from spectune.errors import SpectuneError
from spectune.layers.modules import named_modules
from spectune.reading import open_tensors, read_json

FRESH = "spectune_fresh"  # an attribute of a module that the checkpoint did not have
_LOADED = "_is_hf_initialized"  # transformers' attribute of a tensor that came from the checkpoint
_FILES = ("model.safetensors.index.json", "model.safetensors")
_HEADED = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|Segmentation|Detection|DepthEstimation|XVector|CTC|"
    r"NextSentencePrediction|PreTraining|ImageTextRetrieval)$"
)
_log = getLogger("spectune")


def fresh_modules(model: nn.Module) -> list[str]:
    """Return the modules whose parameters no checkpoint filled, by name, each of which owns parameters itself.

    transformers marks what it loads.  Where the marks are gone (a copy of a model has none) the checkpoint's own list
    of tensors says what it has of the head, and where there is none a task's head counts as new, which is logged.
    """
    owners = {name: module for name, module in named_modules(model) if any(True for _ in _own(module))}
    marked = [name for name, module in owners.items() if getattr(module, FRESH, False)]
    tensors = [p for module in owners.values() for p in _own(module)]
    if any(getattr(p, _LOADED, False) for p in tensors):
        without = {n: [p for p in _own(m) if not getattr(p, _LOADED, False)] for n, m in owners.items()}
        missing = [n for n, of in without.items() if any(not p.is_meta for p in of)]
        if offloaded := [n for n, of in without.items() if of and n not in missing]:  # which have no marks
            missing += [n for n in _unmarked(model, owners) if n in offloaded]
    else:
        missing = _unmarked(model, owners)
    computed = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    embeddings = [id(module) for module in embeddings_of(model)]  # grown by rows, which is another matter
    found = [
        name
        for name in missing
        if id(owners[name]) not in embeddings
        and not any(pattern.search(f"{name}.{key}") for key in owners[name]._parameters for pattern in computed)
    ]
    return list(dict.fromkeys([*marked, *found]))


def mark_loaded(model: nn.Module, tensors: Iterable[object]) -> None:
    """Have tensors count as ones that a checkpoint filled, in a model where such are marked."""
    if any(getattr(p, _LOADED, False) for p in model.parameters()):
        for tensor in tensors:
            setattr(tensor, _LOADED, True)


def fresh_rows(model: nn.Module) -> dict[str, list[int]]:
    """Return the rows of a model's embeddings that its checkpoint had not, by the embedding's name."""
    inner = embeddings_of(model)
    config = _read_json(_file(model, "config.json")) if inner else None
    if not config:
        return {}
    text = config.get("text_config") or {}
    before = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    names = {id(module): name for name, module in model.named_modules()}
    return {
        names[id(module)]: list(range(before, module.weight.shape[0]))
        for module in inner
        if isinstance(before, int) and id(module) in names and module.weight.shape[0] > before
    }


def embeddings_of(model: nn.Module) -> list[nn.Embedding]:
    """Return a model's input and output embeddings."""
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(module, nn.Module) and getattr(module, "weight", None) is not None:
            found.append(module)
    return found


def _unmarked(model: nn.Module, owners: dict[str, nn.Module]) -> list[str]:
    inner = getattr(model, "base_model_prefix", "")
    if not inner or not any(name.startswith(f"{inner}.") for name in owners):
        return []
    head = [name for name in owners if name != inner and not name.startswith(f"{inner}.")]
    keys = _keys(model)
    if keys is not None:
        return [name for name in head if not all(f"{name}.{key}" in keys for key in owners[name]._parameters)]
    if not head or not _HEADED.search(type(model).__name__):
        return []
    _log.warning(
        "it is not known which checkpoint this %s comes from: its head (%s) is trained and saved whole",
        type(model).__name__,
        ", ".join(head),
    )
    return head


def _keys(model: nn.Module) -> set[str] | None:
    """Return the names of the tensors in a model's checkpoint, or None where it is not at hand."""
    for name in _FILES:
        path = _file(model, name)
        if path is None:
            continue
        if name.endswith(".json"):
            index = _read_json(path)
            return set(index.get("weight_map") or ()) if index else None
        try:
            with open_tensors(path) as opened:
                return set(opened.keys())
        except (SafetensorError, OSError, SpectuneError):
            return None
    return None


def _file(model: nn.Module, name: str) -> Path | None:
    """Return a file of a model's checkpoint that is on this machine, or None."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        return None
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    try:
        found = cached_file(
            source,
            name,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _read_json(path: Path | None) -> dict[str, Any] | None:
    try:
        found = None if path is None else read_json(path)
    except SpectuneError:
        return None
    return found if isinstance(found, dict) else None


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module._parameters.values() if p is not None)

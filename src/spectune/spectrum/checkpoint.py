"""The matrices of a checkpoint, by name and not yet read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from spectune.errors import SpectuneError, first_line
from spectune.model.patterns import matching
from spectune.reading import read_json
from spectune.spectrum.listing import READERS, files_of, locate, names_in_index
from spectune.spectrum.names import Place, is_embedding, places
from spectune.spectrum.packing import dequantized
from spectune.spectrum.stored import Stored

_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}  # whose linears are stored (in x out)
_CONV1D_LAYERS = {"c_attn", "q_attn", "c_proj", "c_fc"}


class Matrix(NamedTuple):
    """A matrix to be measured.

    Args:
        name: in the checkpoint; an expert of a stack has its index in brackets.
        shape: (out, in).
        dtype: as stored.
        place: its layer, kind and expert.
        read: returns it (out x in).
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    place: Place
    read: Callable[[], Tensor]

    @property
    def work(self) -> float:
        """Return what its decomposition costs, up to a factor."""
        return float(self.shape[0]) * self.shape[1] * min(self.shape)


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Args:
        model: as the user named it.
        folder: where its config is, if it has one.
        format: "safetensors", "gguf" or "bin".
        fingerprint: of its files' names, sizes and times.
        matrices: those chosen, in the files' order.
        skipped: name -> why it cannot be measured.
    """

    model: str
    folder: Path
    format: str
    fingerprint: str
    matrices: list[Matrix]
    skipped: dict[str, str]


def open_checkpoint(
    model: str, targets: str | list[str] = "all-linear", exclude: str | list[str] = "", *, allow_bin: bool = False
) -> Checkpoint:
    """Find the matrices of a checkpoint, reading its headers only.

    Args:
        model: embedded name, folder, hub id, or a .safetensors, .gguf, .bin or index file.
        targets: "all-linear" (every matrix but embeddings and the output head), name suffixes, or one regex.
        exclude: suffixes or a regex of what to leave out.
        allow_bin: read pickled .bin files, with torch's loader for weights only.

    Raises:
        SpectuneError: no such checkpoint, one that is pickled where that was not allowed, or nothing to measure.
    """
    path = locate(model, allow_bin)
    files, format = files_of(path, allow_bin)
    stored: list[Stored] = []
    skipped: dict[str, str] = {}
    for file in files:
        try:
            stored += READERS[format](file)
        except Exception as error:  # whatever a damaged file makes of the readers
            reason = f"{file.name} cannot be read ({first_line(error)})"
            skipped |= dict.fromkeys(names_in_index(file) or [file.name], reason)
    if not stored:
        raise SpectuneError(f"nothing in {path} can be read: {next(iter(skipped.values()), 'it is empty')}")
    folder = path if path.is_dir() else path.parent
    config = _config(folder)
    conv1d = config.get("model_type") in tuple(_CONV1D)
    matrices, problems = _choose(dequantized(stored, config), targets, exclude, conv1d)
    return Checkpoint(model, folder, format, _fingerprint(files), matrices, skipped | problems)


def _choose(
    stored: list[Stored], targets: str | list[str], exclude: str | list[str], conv1d: bool
) -> tuple[list[Matrix], dict[str, str]]:
    by_layer = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in stored
        if len(tensor.shape) > 1 and 0 not in tensor.shape and not tensor.name.endswith("bias")
    }
    packed = {_owner(tensor.name) for tensor in by_layer.values() if not tensor.floating}
    names = list(by_layer)
    if targets == "all-linear":
        chosen = [name for name in names if not is_embedding(name)]
    else:
        chosen = matching(targets, names, "targets")
    dropped = set(matching(exclude, names, "exclude")) if exclude else set()
    chosen = [name for name in chosen if name not in dropped]
    where = places(chosen)
    matrices, problems = [], {}
    for layer in chosen:
        tensor = by_layer[layer]
        if not tensor.floating:
            problems[tensor.name] = f"stored as {tensor.dtype}, packed or quantized: dequantize it first"
        elif _owner(tensor.name) in packed:
            continue  # what lies beside a packed weight is its scales
        elif len(tensor.shape) == 2:
            matrices.append(_matrix(tensor, where[layer], conv1d))
        elif len(tensor.shape) == 3 and re.search(r"expert|_exps", tensor.name):
            matrices += [_expert(tensor, where[layer], i) for i in range(tensor.shape[0])]
        elif tensor.name.endswith(".weight"):
            problems[tensor.name] = f"has {len(tensor.shape)} dimensions and is no stack of experts"
    if not matrices:
        none = "exclude takes away every target" if dropped else "it has no matrices"
        why = next((f"{name}: {reason}" for name, reason in problems.items()), none)
        raise SpectuneError(f"nothing is left to measure ({why}); name what to measure with --targets")
    return matrices, problems


def _matrix(tensor: Stored, place: Place, conv1d: bool) -> Matrix:
    rows, columns = tensor.shape
    place = place._replace(stacked=not tensor.name.endswith(".weight"))
    if conv1d and place.module.rpartition(".")[2] in _CONV1D_LAYERS:
        return Matrix(tensor.name, (columns, rows), tensor.dtype, place, lambda: tensor.read(None).mT)
    return Matrix(tensor.name, (rows, columns), tensor.dtype, place, partial(tensor.read, None))


def _expert(tensor: Stored, place: Place, index: int) -> Matrix:
    _, rows, columns = tensor.shape
    place = place._replace(expert=index, stacked=True)
    return Matrix(f"{tensor.name}[{index}]", (rows, columns), tensor.dtype, place, partial(tensor.read, index))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _config(folder: Path) -> dict[str, object]:
    config = folder / "config.json"
    found = read_json(config) if config.exists() else {}
    return found if isinstance(found, dict) else {}


def _fingerprint(files: list[Path]) -> str:
    lines = [f"{f.name} {s.st_size} {s.st_mtime_ns}" for f in files if f.exists() and (s := f.stat())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

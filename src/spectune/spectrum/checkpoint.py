"""The matrices of a checkpoint, by name and not yet read: safetensors, GGUF, and .bin where it is asked for."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from spectune.bases.places import model_path
from spectune.errors import SpectuneError, need
from spectune.model.patterns import matching
from spectune.reading import check_file, open_tensors, read_json
from spectune.spectral import shards, weight_map
from spectune.spectrum.names import Place, is_embedding, places
from spectune.spectrum.packing import dequantized
from spectune.spectrum.stored import Stored

_FLOATING = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_LEAST_BITS = 8  # values in a byte of the coarsest quantization
_NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights of a .bin
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
    path = _locate(model, allow_bin)
    files, format = _files(path, allow_bin)
    listing = {"safetensors": _safetensors, "gguf": _gguf, "bin": _bin}[format]
    stored: list[Stored] = []
    skipped: dict[str, str] = {}
    for file in files:
        try:
            stored += listing(file)
        except Exception as error:  # whatever a damaged file makes of the readers
            reason = f"{file.name} cannot be read ({_first_line(error)})"
            skipped |= dict.fromkeys(_names_in_index(file) or [file.name], reason)
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
        why = next((f"{name}: {reason}" for name, reason in problems.items()), "it has no matrices")
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


# -- formats


def _locate(model: str, allow_bin: bool) -> Path:
    if Path(model).is_file():
        return Path(model)
    named = model_path(model)
    if Path(named).is_dir():
        return Path(named)
    patterns = ["*.json", "*.safetensors", *(["*.bin"] if allow_bin else [])]
    try:
        return Path(snapshot_download(named, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise SpectuneError(f"{model!r} is neither here nor on the hub: {_first_line(error)}") from None


def _files(path: Path, allow_bin: bool) -> tuple[list[Path], str]:
    if path.suffix == ".gguf":
        return _gguf_parts(path), "gguf"
    if path.suffix in (".bin", ".pt", ".pth") or path.name.endswith(".bin.index.json"):
        return _allowed(path, allow_bin)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        found = sorted(path.glob("pytorch_model*.bin")) or sorted(path.glob("*.gguf"))
        if found and found[0].suffix == ".bin":
            return _allowed(path, allow_bin)
        if found:
            raise SpectuneError(f"{path} holds GGUF files; name the one to read, {str(found[0])!r} for one")
    return shards(path), "safetensors"


def _allowed(path: Path, allow_bin: bool) -> tuple[list[Path], str]:
    if not allow_bin:
        raise SpectuneError(f"{path} is a pickled checkpoint; allow it with --bin (it is loaded as weights only)")
    if path.name.endswith(".index.json"):
        return sorted({path.parent / name for name in weight_map(path).values()}), "bin"
    return (sorted(path.glob("pytorch_model*.bin")) if path.is_dir() else [path]), "bin"


def _safetensors(file: Path) -> Iterator[Stored]:
    def read(name: str, index: int | None) -> Tensor:
        with open_tensors(file) as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]

    with open_tensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            piece = opened.get_slice(name)
            dtype = piece.get_dtype()
            yield Stored(name, tuple(piece.get_shape()), dtype, dtype in _FLOATING, partial(read, name))


def _gguf_parts(path: Path) -> list[Path]:
    """Return the files of a GGUF checkpoint of which one is named."""
    part = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})", path.stem)
    if part is None:
        return [path]
    stem, count = part[1], int(part[2])
    files = [path.with_name(f"{stem}-{number:05}-of-{part[2]}.gguf") for number in range(1, count + 1)]
    missing = next((file.name for file in files if not file.is_file()), None)
    if missing is not None:
        raise SpectuneError(f"{str(path)!r} is one of {count} files, and {missing} is not beside it")
    return files


def _gguf(file: Path) -> Iterator[Stored]:
    gguf, quants = (need(name, f"reading {str(file)!r}", "gguf") for name in ("gguf", "gguf.quants"))

    def read(tensor: Any, index: int | None) -> Tensor:
        data = tensor.data if index is None else tensor.data[index]
        values = data if data.dtype.kind == "f" else quants.dequantize(data, tensor.tensor_type)
        values = torch.from_numpy(values.copy())
        if (scale := scales.get(tensor.name.removesuffix(".weight"))) is not None:  # which llama.cpp multiplies W x by
            factors = torch.from_numpy(scale.data.copy())
            values *= factors if index is None or factors.numel() == 1 else factors[index]
        return values

    def is_known(tensor: Any) -> bool:
        block = np.zeros(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], np.uint8)
        try:
            return tensor.data.dtype.kind == "f" or quants.dequantize(block, tensor.tensor_type) is not None
        except NotImplementedError:
            return False

    check_file(file)
    size = file.stat().st_size
    tensors = gguf.GGUFReader(file).tensors
    scales = {
        t.name.removesuffix(".scale"): t for t in tensors if t.name.endswith(".scale") and t.data.dtype.kind == "f"
    }
    for tensor in tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        if int(tensor.n_bytes) > size or math.prod(shape) > _LEAST_BITS * int(tensor.n_bytes):
            raise SpectuneError(f"{tensor.name!r} in {file} is said to have {math.prod(shape):,} values, more than fit")
        yield Stored(tensor.name, shape, tensor.tensor_type.name, is_known(tensor), partial(read, tensor))


def _bin(file: Path) -> Iterator[Stored]:
    try:  # torch before 1.6 wrote no zip files, and they cannot be mapped
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise SpectuneError(f"{file} holds more than weights and is not loaded: {_first_line(error)}") from None
    except Exception as error:  # whatever a damaged file makes of the reader
        raise SpectuneError(_first_line(error)) from None
    if not isinstance(held, dict):
        raise SpectuneError(f"{file} holds a {type(held).__name__}, not tensors by name")
    held = next((held[key] for key in _NESTED if isinstance(held.get(key), dict)), held)
    if held and not any(isinstance(value, Tensor) for value in held.values()):
        raise SpectuneError(f"{file} holds {', '.join(map(repr, list(held)[:5]))} and no tensors by name")

    def read(tensor: Tensor, index: int | None) -> Tensor:
        return tensor if index is None else tensor[index]

    for name, tensor in held.items():
        if isinstance(tensor, Tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield Stored(name, tuple(tensor.shape), dtype, dtype in _FLOATING, partial(read, tensor.detach()))


def _config(folder: Path) -> dict[str, object]:
    config = folder / "config.json"
    found = read_json(config) if config.exists() else {}
    return found if isinstance(found, dict) else {}


def _fingerprint(files: list[Path]) -> str:
    lines = [f"{f.name} {s.st_size} {s.st_mtime_ns}" for f in files if f.exists() and (s := f.stat())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _names_in_index(file: Path) -> list[str]:
    for index in file.parent.glob("*.index.json"):
        try:
            return [name for name, shard in weight_map(index).items() if shard == file.name]
        except SpectuneError:
            continue
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

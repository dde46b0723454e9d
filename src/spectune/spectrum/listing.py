"""The files of a checkpoint, and the tensors in them: safetensors, GGUF, and .bin where it is asked for."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from spectune.bases.places import model_path
from spectune.errors import SpectuneError, first_line, need
from spectune.reading import check_file, open_tensors
from spectune.spectral import shards, weight_map
from spectune.spectrum.stored import Stored

_FLOATING = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_LEAST_BITS = 8  # values in a byte of the coarsest quantization
_NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights of a .bin


def locate(model: str, allow_bin: bool) -> Path:
    """Return where a checkpoint lies: a file, a folder, or what the hub has of it.

    Raises:
        SpectuneError: it is nowhere.
    """
    if Path(model).is_file():
        return Path(model)
    named = model_path(model)
    if Path(named).is_dir():
        return Path(named)
    patterns = ["*.json", "*.safetensors", *(["*.bin"] if allow_bin else [])]
    try:
        return Path(snapshot_download(named, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise SpectuneError(f"{model!r} is neither here nor on the hub: {first_line(error)}") from None


def files_of(path: Path, allow_bin: bool) -> tuple[list[Path], str]:
    """Return a checkpoint's files and their format, which `READERS` has.

    Raises:
        SpectuneError: files that are pickled where that was not allowed, or of which one must be named.
    """
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
        raise SpectuneError(f"{file} holds more than weights and is not loaded: {first_line(error)}") from None
    except Exception as error:  # whatever a damaged file makes of the reader
        raise SpectuneError(first_line(error)) from None
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


def names_in_index(file: Path) -> list[str]:
    """Return the tensors that an index says are in a file."""
    for index in file.parent.glob("*.index.json"):
        try:
            return [name for name, shard in weight_map(index).items() if shard == file.name]
        except SpectuneError:
            continue
    return []


READERS: dict[str, Callable[[Path], Iterator[Stored]]] = {"safetensors": _safetensors, "gguf": _gguf, "bin": _bin}

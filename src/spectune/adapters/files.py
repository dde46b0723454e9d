"""Adapter folders: two files, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.adapter import Adapter, LayerUpdate, Term, needs_basis
from spectune.errors import SpectuneError, nearest
from spectune.methods import from_fields

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT_VERSION = 1
_KEYS = {"library_name", "format_version", "base_model_name_or_path", "methods", "layers", "error"}
_LAYER_KEYS = {"shape", "conv1d", "terms"}


def save(adapter: Adapter, path: Path, *, embed: bool = False) -> Path:
    """Write an adapter's folder; LoRA and DoRA around LoRA in PEFT's format, all else in spectune's."""
    from spectune.adapters.peft_format import is_peft, save_peft

    if is_peft(adapter):
        return save_peft(adapter, path)
    tensors: dict[str, Tensor] = {}
    methods: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}
    for name in adapter.layers:
        layer = adapter.complete(name) if embed else adapter.layer(name)
        terms = []
        for i, term in enumerate(layer.terms):
            described = term.method.fields()
            if described not in methods:
                methods.append(described)
            terms.append({"method": methods.index(described), "weight": term.weight})
            tensors |= {f"{name}.{i}.{key}": value for key, value in term.trained.items()}
            if embed and needs_basis(term.method):
                tensors |= {f"{name}.{i}.basis.{key}": value for key, value in (term.basis or {}).items()}
        tensors[f"{name}.sketch"] = adapter.sketch(name)
        base = layer.base_sketch
        if base is None and layer.weight is not None:
            base = fingerprint.sketch_weight(layer.weight)
        if base is not None:
            tensors[f"{name}.base"] = base
        layers[name] = {"shape": list(layer.shape), "conv1d": layer.conv1d, "terms": terms}
    config = {
        "library_name": "spectune",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "methods": methods,
        "layers": layers,
        "error": adapter.error,
    }
    return write_folder(path, config, tensors)


def load(path: Path) -> Adapter:
    """Read an adapter's folder in either format."""
    config = read_config(path)
    if config.get("library_name") != "spectune" and "peft_type" in config:
        from spectune.adapters.peft_format import load_peft

        return load_peft(path)
    where = path / CONFIG
    check_keys(config, _KEYS, str(where))
    if config["format_version"] != FORMAT_VERSION:
        raise SpectuneError(f"{where} has format version {config['format_version']!r}; this release reads 1")
    methods = [from_fields(fields) for fields in config["methods"]]
    tensors = read_tensors(path)
    layers = {}
    for name, entry in config["layers"].items():
        check_keys(entry, _LAYER_KEYS, f"layer {name!r} in {where}")
        out, into = entry["shape"]
        terms = []
        for i, described in enumerate(entry["terms"]):
            check_keys(described, {"method", "weight"}, f"layer {name!r} in {where}")
            method = methods[described["method"]]
            trained = {
                key: _take(tensors, f"{name}.{i}.{key}", shape, path)
                for key, shape in method.shapes(out, into).items()
            }
            prefix = f"{name}.{i}.basis."
            basis = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
            terms.append(Term(method, trained, described["weight"], basis or None))
        layers[name] = LayerUpdate(
            shape=(out, into),
            terms=tuple(terms),
            conv1d=entry["conv1d"],
            base_sketch=tensors.pop(f"{name}.base", None),
            update_sketch=tensors.pop(f"{name}.sketch", None),
        )
    if tensors:
        raise SpectuneError(f"{path / WEIGHTS} has a tensor that its config does not speak of: {min(tensors)!r}")
    return Adapter(layers, config["base_model_name_or_path"], config["error"])


def _take(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], path: Path) -> Tensor:
    if key not in tensors:
        raise SpectuneError(f"{path / WEIGHTS} lacks the tensor {key!r}{nearest(key, tensors)}")
    tensor = tensors.pop(key)
    if tuple(tensor.shape) != tuple(shape):
        raise SpectuneError(f"{key!r} in {path / WEIGHTS} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor


def check_keys(found: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise unless a mapping has exactly the known keys, naming the first that is unknown or missing."""
    for key in sorted(found.keys() - known):
        raise SpectuneError(f"{where} has the unknown key {key!r}{nearest(key, known)}")
    for key in sorted(known - found.keys()):
        raise SpectuneError(f"{where} lacks the key {key!r}")


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of an adapter's folder as a mapping."""
    if not path.is_dir():
        raise SpectuneError(f"there is no adapter folder {str(path)!r}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpectuneError(f"{str(path)!r} is not an adapter: it has no {CONFIG}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpectuneError(f"{path / CONFIG} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise SpectuneError(f"{path / CONFIG} is not a JSON object")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder, and check them against the digest that we store with them."""
    where = path / WEIGHTS
    try:
        with safe_open(where, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            digest = (opened.metadata() or {}).get("sha256")
    except FileNotFoundError:
        raise SpectuneError(f"{str(path)!r} is not an adapter: it has no {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise SpectuneError(f"{where} is damaged or cut short ({error}); get it again") from None
    if digest is not None and digest != _digest(tensors):
        raise SpectuneError(f"{where} was changed after it was written: its checksum does not match; get it again")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SpectuneError(f"{where} holds values that are not finite, in {key!r}")
    return tensors


def write_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the two files, the tensors first, each whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    path.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "sha256": _digest(tensors)}
    write_atomically(path / WEIGHTS, lambda temporary: save_file(tensors, temporary, metadata))
    text = json.dumps(config, indent=2, sort_keys=False) + "\n"
    write_atomically(path / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary name beside the target, flush it to disk, and rename it."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()

"""A folder of two files that belong together: written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.storage import flush, keep_beside, remove_all, write_beside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LABELS = "labels"  # in the metadata of the weights, where PEFT's format has no place for them
_WAITS = (0.01, 0.05, 0.2)  # seconds before reading a folder again that is being replaced
_DIGEST, _CONFIG_DIGEST = "sha256", "config_sha256"  # in the metadata of the weights
_OUR_KEYS = ("format_version", "methods", "layers")
_PEFT_KEYS = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BOUND_KEYS = {*_OUR_KEYS, *_PEFT_KEYS}  # without which the weights do not say what the update is


T = TypeVar("T")


class _Torn(SpectuneError):
    """The two files of a folder do not belong together."""


def read_whole(read: Callable[[Path], T], path: Path) -> T:
    """Return read(path), tried again while another process seems to be replacing the folder."""
    for wait in _WAITS:
        try:
            return read(path)
        except _Torn:
            time.sleep(wait)
    return read(path)


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of an adapter's folder as a mapping."""
    if not path.is_dir():
        raise SpectuneError(f"there is no adapter folder {str(path)!r}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpectuneError(f"{str(path)!r} is not an adapter: it has no {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpectuneError(f"{path / CONFIG} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise SpectuneError(f"{path / CONFIG} is not a JSON object")
    return config


def read_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder, and check the digests that are stored with them.

    Args:
        path: the folder.
        config: what `read_config` returned.
    """
    where = path / WEIGHTS
    try:
        with safe_open(where, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except FileNotFoundError:
        raise SpectuneError(f"{str(path)!r} is not an adapter: it has no {WEIGHTS}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise SpectuneError(f"{where} is damaged or cut short ({error}); get it again") from None
    digests = {_DIGEST: _digest(tensors), _CONFIG_DIGEST: _config_digest(config)}
    found = {key: metadata.get(key) for key in digests if metadata.keys() & digests.keys()}  # none by other tools
    if found.get(_DIGEST, digests[_DIGEST]) != digests[_DIGEST]:
        raise SpectuneError(f"{where} was changed after it was written: its checksum does not match; get it again")
    if found.get(_CONFIG_DIGEST, digests[_CONFIG_DIGEST]) != digests[_CONFIG_DIGEST]:
        raise _Torn(
            f"{path / CONFIG} and {WEIGHTS} do not belong together: the config was changed, or a write was cut "
            "off between the two; get or save the adapter again"
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SpectuneError(f"{where} holds values that are not finite, in {key!r}")
    return tensors


def read_labels(path: Path) -> list[str] | None:
    """Return the labels of a classifier's head that are stored with an adapter's weights, if any."""
    with safe_open(path / WEIGHTS, framework="pt") as opened:
        text = (opened.metadata() or {}).get(_LABELS)
    if text is None:
        return None
    try:
        labels = json.loads(text)
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise SpectuneError(f"{path / WEIGHTS} has labels that are not understood: {text!r:.60}")
    return labels


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's two files."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()


def write_folder(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], labels: Sequence[str] | None = None
) -> Path:
    """Write the two files, both or none; the weights name their config's digest, so that a torn pair is found out.

    Both are written in full under temporary names before the first is renamed, and the old weights are put back should
    the second rename fail.
    """
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    metadata = _metadata(_digest(tensors), _config_digest(config))
    if labels is not None:
        metadata[_LABELS] = json.dumps(labels)
    text = _text(config)
    path.mkdir(parents=True, exist_ok=True)
    temporaries: list[Path] = []
    try:
        weights = write_beside(path / WEIGHTS, lambda to: save_file(tensors, to, metadata), temporaries)
        described = write_beside(path / CONFIG, lambda to: to.write_text(text, encoding="utf-8"), temporaries)
        fresh = not (path / WEIGHTS).exists()
        old = None if fresh else keep_beside(path / WEIGHTS, temporaries)
        os.replace(weights, path / WEIGHTS)
        try:
            os.replace(described, path / CONFIG)
        except BaseException:
            if old is not None:
                os.replace(old, path / WEIGHTS)
            elif fresh:
                (path / WEIGHTS).unlink()
            raise
        flush(path)
    finally:
        remove_all(temporaries)
    return path


def folder_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the bytes of the weights' file and of the config that `write_folder` would write.

    Args:
        config: the config.
        tensors: tensors of the shapes and dtypes to be written; their values, if they have any, do not matter.
    """
    weights = safetensors_size(tensors, _metadata("0" * 64, "0" * 64))
    return weights, len(_text(config).encode())


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return the bytes of a safetensors file: 8, the header padded to a multiple of 8, and the data.

    Args:
        tensors: by name; of one dtype, or in the order in which safetensors writes them.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in sorted(tensors):
        start, end = end, end + tensors[key].numel() * tensors[key].element_size()
        dtype = _SAFETENSORS_NAMES[tensors[key].dtype]
        header[key] = {"dtype": dtype, "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def _metadata(digest: str, config_digest: str) -> dict[str, str]:
    return {"format": "pt", _DIGEST: digest, _CONFIG_DIGEST: config_digest}


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def _config_digest(config: Mapping[str, Any]) -> str:
    """Return the digest of what a config says of the update; a base's name, say, may be edited by hand."""
    bound = {key: value for key, value in config.items() if key in _BOUND_KEYS}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()

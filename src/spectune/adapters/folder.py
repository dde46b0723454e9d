"""A folder of two files that belong together: written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from spectune.errors import SpectuneError, nearest
from spectune.reading import (
    DIMENSIONS,
    MOST_TENSORS,
    check_file,
    check_memory,
    open_tensors,
    parse_json,
    read_json,
    sha256,
)
from spectune.storage import (
    alone_in,
    bytes_of,
    collect_temporaries,
    flush,
    save_tensors,
    temporary_beside,
    tensors_header,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_WAITS = (0.01, 0.05, 0.2)  # seconds before reading a folder again that is being replaced
_DIGEST, _CONFIG_DIGEST = "sha256", "config_sha256"  # in the metadata of the weights
_OUR_KEYS = ("format_version", "methods", "layers", "modules")
_PEFT_KEYS = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_PEFT_KEYS += ("trainable_token_indices", "target_parameters")
_BOUND_KEYS = {*_OUR_KEYS, *_PEFT_KEYS}  # without which the weights do not say what the update is


T = TypeVar("T")


class Unwritten:
    """A folder that is yet to be written: whoever reads it is given what the files would hold.

    Args:
        path: where it will be.
        config: what its config will say.
        tensors: of its weights.
        more: what is stored with the weights besides, as texts.
    """

    def __init__(
        self, path: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], more: Mapping[str, str] | None
    ) -> None:
        self.path, self.text, self.tensors, self.more = path, _text(config), dict(tensors), dict(more or {})

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)


Source = Path | Unwritten


def _check_readable(read: Callable[[Unwritten], object], folder: Unwritten) -> None:
    """Raise unless what is to be written passes the checks of whoever will read it."""
    try:
        read(folder)
    except SpectuneError as error:
        raise SpectuneError(f"the adapter cannot be saved, since it could not be loaded again: {error}") from None


class _Torn(SpectuneError):
    """The two files of a folder do not belong together."""


def read_whole(read: Callable[[Path], T], path: Path) -> T:
    """Return read(path) of one version of the folder: again where another process replaces it meanwhile.

    What a killed writer left is put in order first: a replacement that had begun is finished, one that had not is taken
    away.
    """
    _settle(path)
    for wait in _WAITS:
        before = _state(path)
        try:
            found = read(path)
            if _state(path) == before:
                return found
        except _Torn:
            pass
        except (SpectuneError, OSError):
            if _state(path) == before:
                raise
        time.sleep(wait)
    return read(path)


def _state(path: Path) -> list[tuple[int, int, int] | None]:
    """Return what changes when a file of a folder is replaced."""
    found: list[tuple[int, int, int] | None] = []
    for name in (CONFIG, WEIGHTS):
        try:
            status = (path / name).stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found


def _settle(path: Path) -> None:
    """Finish or take back what a killed writer left in a folder, as far as it can be written to."""
    if not any(path.glob(".adapter_*.tmp")):
        return
    with suppress(OSError), alone_in(path):
        finished = _finished_config(path)
        if finished is not None:
            os.replace(finished, path / CONFIG)
        collect_temporaries(path, "adapter_*")


def _finished_config(path: Path) -> Path | None:
    """Return the config that is yet to be renamed beside weights that it belongs to, if there is one."""
    wanted = _config_of_weights(path / WEIGHTS)
    candidates = [path / CONFIG, *sorted(path.glob(f".{CONFIG}.*.tmp"))] if wanted is not None else []
    for candidate in candidates:
        with suppress(SpectuneError):
            if _config_digest(_parsed(candidate)) == wanted:
                return None if candidate.name == CONFIG else candidate
    return None


def _config_of_weights(weights: Path) -> str | None:
    try:
        with open_tensors(weights) as opened:
            return (opened.metadata() or {}).get(_CONFIG_DIGEST)
    except (SpectuneError, SafetensorError, OSError, ValueError, RuntimeError):
        return None


def read_config(path: Source) -> dict[str, Any]:
    """Read the config of an adapter's folder as a mapping."""
    if isinstance(path, Unwritten):
        return parse_json(path.text, str(path / CONFIG))
    if not path.is_dir():
        beside = [place.name for place in path.parent.iterdir() if place.is_dir()] if path.parent.is_dir() else []
        raise SpectuneError(f"there is no adapter folder {str(path)!r}{nearest(path.name, beside)}")
    if not (path / CONFIG).exists() and _finished_config(path) is None:
        if (path / "config.yaml").is_file():
            raise SpectuneError(
                f"{path} holds no adapter yet: its run has not ended; go on with `spectune train "
                f"{path / 'config.yaml'} resume=true`"
            )
        raise SpectuneError(f"{str(path)!r} is not an adapter: it has no {CONFIG}")
    return _parsed(_finished_config(path) or path / CONFIG)


def _parsed(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise SpectuneError(f"{path} is not a JSON object")
    return config


def read_tensors(path: Source, config: Mapping[str, object]) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder, and check the digests that are stored with them.

    Args:
        path: the folder.
        config: what `read_config` returned.
    """
    where = path / WEIGHTS
    if isinstance(path, Unwritten):
        return _checked(dict(path.tensors), where)
    try:
        check_memory(where, "the adapter cannot be read")
        with open_tensors(where) as opened:
            if len(opened.keys()) > MOST_TENSORS:
                raise SpectuneError(f"{where} has {len(opened.keys()):,} tensors; at most {MOST_TENSORS:,} are read")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except FileNotFoundError:
        raise SpectuneError(f"{str(path)!r} is not an adapter: it has no {WEIGHTS}") from None
    except SpectuneError:
        raise
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
    return _checked(tensors, where)


def _checked(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Return tensors that an adapter may have."""
    if len(tensors) > MOST_TENSORS:
        raise SpectuneError(f"{where} has {len(tensors):,} tensors; at most {MOST_TENSORS:,} are read")
    for key, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
            raise SpectuneError(f"{key!r} in {where} is {tensor.dtype}, which no adapter has; convert it to float32")
        if not _finite(tensor):
            raise SpectuneError(f"{where} holds values that are not finite, in {key!r}")
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """Read the tensors that PEFT pickled, and nothing else from there."""
    where = path / PICKLED
    check_file(where)
    check_memory(where, "the adapter cannot be read")
    try:
        tensors = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or dangerous file makes of the reader
        raise SpectuneError(f"{where} cannot be read as tensors alone ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise SpectuneError(f"{where} holds more than tensors by name")
    for key, tensor in tensors.items():
        if tensor.dim() > DIMENSIONS:
            raise SpectuneError(f"{key!r} in {where} has more than {DIMENSIONS} dimensions; the file is damaged")
        if not _finite(tensor):
            raise SpectuneError(f"{where} holds values that are not finite, in {key!r}")
    return tensors


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's two files."""
    return sha256(folder / CONFIG, folder / WEIGHTS)


def write_folder(
    path: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    more: Mapping[str, str] | None = None,
    *,
    read: Callable[[Unwritten], object],
) -> Path:
    """Write the two files, both or none; the weights name their config's digest, so that a torn pair is found out.

    What is to be written is read with all the checks of loading, before anything is replaced.

    Both are written in full under temporary names before the first is renamed.  The old weights are put back should the
    second rename fail; where the process is killed between the two, whoever reads the folder next finishes it.

    Raises:
        SpectuneError: values that are not finite, or whatever else reading would refuse; what is there stays.
    """
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    for key, tensor in tensors.items():
        if not _finite(tensor):
            raise SpectuneError(
                f"the adapter cannot be saved: {key!r} has values that are not finite; go back to a checkpoint, or "
                "train with a lower learning rate"
            )
    _check_readable(read, Unwritten(path, config, tensors, more))
    metadata = {**_metadata(_digest(tensors), _config_digest(config)), **(more or {})}
    text = _text(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SpectuneError(f"{path} cannot be made: a file is in its place; give another folder") from None
    with (
        alone_in(path),
        temporary_beside(path / WEIGHTS) as weights,
        temporary_beside(path / CONFIG) as described,
        temporary_beside(path / WEIGHTS) as old,
    ):
        save_tensors(tensors, weights, metadata)
        described.write_text(text, encoding="utf-8")
        flush(weights)
        flush(described)
        fresh = not (path / WEIGHTS).exists()
        kept = not fresh and _linked(path / WEIGHTS, old)
        os.replace(weights, path / WEIGHTS)
        try:
            os.replace(described, path / CONFIG)
        except BaseException:
            if kept:
                os.replace(old, path / WEIGHTS)
            elif fresh:
                (path / WEIGHTS).unlink()
            raise
        flush(path)
    collect_temporaries(path, "adapter_*")
    return path


def _linked(path: Path, other: Path) -> bool:
    """Give a file a second name in place of another file, where the file system can."""
    try:
        other.unlink()
        os.link(path, other)
    except OSError:
        return False
    return True


def folder_sizes(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """Return the bytes of the weights' file and of the config that `write_folder` would write.

    Args:
        config: the config.
        tensors: tensors of the shapes and dtypes to be written; their values, if they have any, do not matter.
        more: as for `write_folder`.
    """
    weights = safetensors_size(tensors, {**_metadata("0" * 64, "0" * 64), **(more or {})})
    return weights, len(_text(config).encode())


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return the bytes of a safetensors file: 8, the header padded to a multiple of 8, and the data.

    Args:
        tensors: by name; their values, if they have any, do not matter.
        metadata: of the file.
    """
    return len(tensors_header(tensors, metadata)) + sum(t.numel() * t.element_size() for t in tensors.values())


def _metadata(digest: str, config_digest: str) -> dict[str, str]:
    return {"format": "pt", _DIGEST: digest, _CONFIG_DIGEST: config_digest}


def _text(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2) + "\n"


def _config_digest(config: Mapping[str, object]) -> str:
    """Return the digest of what a config says of the update; a base's name, say, may be edited by hand."""
    bound = {key: value for key, value in config.items() if key in _BOUND_KEYS}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()

"""A folder of two files that belong together: written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectune.errors import SpectuneError, nearest

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


class Entry:
    """A JSON object of a config, whose values are asked for with their types.

    Args:
        values: the object.
        where: what to call it in messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise SpectuneError(f"{where} is {values!r:.60}, not a JSON object")
        self.values, self.where = values, where

    def check_keys(self, *known: str) -> None:
        """Raise unless the object has exactly these keys, naming the first that is unknown or missing."""
        for key in sorted(self.values.keys() - set(known)):
            raise SpectuneError(f"{self.where} has the unknown key {key!r}{nearest(key, known)}")
        for key in sorted(set(known) - self.values.keys()):
            raise SpectuneError(f"{self.where} lacks the key {key!r}")

    def take(self, key: str, *kinds: type, default: Any = None) -> Any:
        """Return a value, which must be of one of the types (True is no int), or the default where it is not there."""
        if key not in self.values and default is not None:
            return default
        value = self.values.get(key)
        if type(value) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise SpectuneError(f"{key!r} in {self.where} is {value!r:.60}, not {names}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a value, which must be a finite number."""
        value = self.take(key, int, float, default=default)
        if not abs(value) < 1e300:
            raise SpectuneError(f"{key!r} in {self.where} is {value!r:.60}, not a finite number")
        return value

    def inside(self, key: str) -> Entry:
        """Return the JSON object that is the value of a key; an empty one where it is not there or null."""
        value = self.values.get(key)
        return Entry({} if value is None else value, f"{key!r} in {self.where}")


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


def write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary name beside the target, flush it to disk, and rename it."""
    temporaries: list[Path] = []
    try:
        os.replace(_write_beside(target, write, temporaries), target)
        _flush(target.parent)
    finally:
        _remove(temporaries)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the context, have a file locked, which one process or thread has at a time; it goes with its process.

    Raises:
        SpectuneError: the file cannot be made or locked.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise SpectuneError(f"{path} cannot be written: {error.strerror}") from None
    except NotImplementedError:
        raise SpectuneError(f"{path} cannot be locked: use a file system that has locks") from None
    try:
        yield
    finally:
        lock.release()


def publish(folder: Path, target: Path) -> None:
    """Flush a folder's files to the disk and give it its name; a folder that has it already goes."""
    for path in (*folder.iterdir(), folder):
        _flush(path)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
        os.replace(target, old)
        os.replace(folder, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, target)
    _flush(target.parent)


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's two files."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()


@contextmanager
def telling_of_full_disks(what: Path, kept: str) -> Iterator[None]:
    """Within the context, what cannot be written is told in one sentence.

    Raises:
        SpectuneError: it cannot.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # not from torch.save
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise SpectuneError(f"{what} cannot be written ({reason}); {kept}") from error


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
        weights = _write_beside(path / WEIGHTS, lambda to: save_file(tensors, to, metadata), temporaries)
        described = _write_beside(path / CONFIG, lambda to: to.write_text(text, encoding="utf-8"), temporaries)
        fresh = not (path / WEIGHTS).exists()
        old = None if fresh else _keep_beside(path / WEIGHTS, temporaries)
        os.replace(weights, path / WEIGHTS)
        try:
            os.replace(described, path / CONFIG)
        except BaseException:
            if old is not None:
                os.replace(old, path / WEIGHTS)
            elif fresh:
                (path / WEIGHTS).unlink()
            raise
        _flush(path)
    finally:
        _remove(temporaries)
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


def _write_beside(target: Path, write: Callable[[Path], Any], temporaries: list[Path]) -> Path:
    """Write a temporary file in the target's folder, flushed to the disk."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporaries.append(temporary := Path(name))
    write(temporary)
    _flush(temporary)
    temporary.chmod(0o666 & ~_umask())
    return temporary


def _remove(temporaries: list[Path]) -> None:
    for temporary in temporaries:
        temporary.unlink(missing_ok=True)


def _keep_beside(target: Path, temporaries: list[Path]) -> Path | None:
    """Give a file that is about to be replaced a second, temporary name, where the file system can."""
    second = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    try:
        second.unlink(missing_ok=True)
        os.link(target, second)
    except OSError:
        return None
    temporaries.append(second)
    return second


def _flush(path: Path) -> None:
    """Have a file, or a folder's entries where the system allows it, written to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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

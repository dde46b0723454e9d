"""Files that are written whole or not at all, locked, and told of in one sentence where they cannot be."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from spectune.errors import SpectuneError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
ABANDONED = 3600.0  # seconds after which a temporary file's writer is taken for dead, where nothing can be locked


@contextmanager
def temporary_beside(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Within the context, have an empty file or folder beside a target, which goes afterwards unless it was renamed.

    It is made with the mode that the system gives new files, and locked as long as its writer lives, so that
    `collect_temporaries` knows what a killed one left.
    """
    while True:
        # in the target's own folder: a rename is whole only within one file system
        path = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
        if folder:
            path.mkdir()
            handle = None if fcntl is None else os.open(path, os.O_RDONLY)
        else:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(handle) is not False and path.exists():  # else it was collected before it was locked
            break
        _close(handle)
    if fcntl is None and handle is not None:  # where an open file cannot be renamed
        handle = _close(handle)
    try:
        yield path
    finally:
        _close(handle)
        _remove(path)


def collect_temporaries(folder: Path, of: str = "*") -> None:
    """Remove what killed writers left in a folder.

    Args:
        folder: where.
        of: pattern of the names of what they were to write.
    """
    for path in sorted(folder.glob(f".{of}.{'[0-9a-f]' * 12}.tmp")):
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            handle = None if fcntl is None else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                free = _lock(handle)
                if free or (free is None and time.time() - path.stat().st_mtime > ABANDONED):
                    _remove(path)
            finally:
                _close(handle)


def _lock(handle: int | None) -> bool | None:
    """Lock an open file or folder and return whether it was free; None where the file system has no locks."""
    if fcntl is None or handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _remove(path: Path) -> None:
    with suppress(OSError):  # read-only, or open in another process where that forbids it
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name beside the target, flush it to disk, and rename it."""
    collect_temporaries(target.parent, glob.escape(target.name[:200]))
    with temporary_beside(target) as temporary:
        write(temporary)
        flush(temporary)
        os.replace(temporary, target)
        # the folder too, or a power cut may take the new name back
        flush(target.parent)


def check_place(path: Path) -> None:
    """Make the folder of a file that is to be written when long work is done, before the work is begun.

    Raises:
        SpectuneError: the file could not be written there.
    """
    if path.is_dir():
        raise SpectuneError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path):
            pass
    except OSError as error:
        raise SpectuneError(f"{path} cannot be written ({error.strerror}): give another place") from None


def check_page_place(path: Path) -> None:
    """Do as `check_place` does for a web page, which takes the place of an earlier page and of nothing else.

    Raises:
        SpectuneError: the file could not be written there, or is something else.
    """
    check_place(path)
    if path.exists():
        with path.open("rb") as file:
            begin = file.read(15)
        if begin and begin.lower() != b"<!doctype html>":
            raise SpectuneError(f"{path} exists and is no web page, so that it is not overwritten: give another file")


def open_itself(path: Path, mode: str) -> IO[bytes]:
    """Open a file to be written to in place, itself and never through a link to another.

    Args:
        path: the file.
        mode: "ab" to write at its end, "r+b" anywhere, "wb" anew.

    Raises:
        SpectuneError: it is a symbolic link.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    try:
        return cast("IO[bytes]", open(path, mode, encoding=None, opener=opener))
    except OSError as error:
        if path.is_symlink():
            raise SpectuneError(f"{path} is a symbolic link, through which nothing is written: remove it") from None
        raise error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: the same bytes for the same tensors, and no other file on the way."""
    with path.open("wb") as file:
        file.write(tensors_header(tensors, metadata or {}))
        for name in _in_order(tensors):
            file.write(bytes_of(tensors[name]))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, which are copied only where they lie on another device or apart from each other."""
    data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)  # numpy's arrays are buffers, and have no type of one before Python 3.12


def tensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return what a safetensors file begins with: the length, and JSON of names, dtypes, shapes and places."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    # largest numbers first, so that each tensor begins at a multiple of its own numbers' size, as who maps the file
    # wants it
    for name in _in_order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return names such that each tensor begins where its numbers may."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the context no other process or thread that asks is in it too, where folders can be locked."""
    handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None and handle is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        _close(handle)


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
    """Flush a folder's files to the disk and give it its name; a folder that has it already goes.

    On Linux the two change places at once, so that there is never none and never half of one.
    """
    for path in (*folder.rglob("*"), folder):
        flush(path)
    if target.exists():
        with temporary_beside(target, folder=True) as old:
            if exchange(folder, target):
                os.replace(folder, old)
            else:
                os.rmdir(old)
                os.replace(target, old)
                os.replace(folder, target)
    else:
        os.replace(folder, target)
    flush(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Have two files or folders change names at once, and return whether the system can."""
    if not sys.platform.startswith("linux"):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), both) == 0
    except (OSError, AttributeError):  # another library of C
        return False


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
        if isinstance(error, PermissionError):
            reason += ": its permissions forbid it, or another program may have it open"
        raise SpectuneError(f"{what} cannot be written ({reason}); {kept}") from error


def flush(path: Path) -> None:
    """Have a file, or a folder's entries where the system allows it, written to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

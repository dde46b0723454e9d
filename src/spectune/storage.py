"""Files that are written whole or not at all, locked, and told of in one sentence where they cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from spectune.errors import SpectuneError, nearest


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


def write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary name beside the target, flush it to disk, and rename it."""
    temporaries: list[Path] = []
    try:
        os.replace(write_beside(target, write, temporaries), target)
        flush(target.parent)
    finally:
        remove_all(temporaries)


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
        flush(path)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
        os.replace(target, old)
        os.replace(folder, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, target)
    flush(target.parent)


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


def write_beside(target: Path, write: Callable[[Path], Any], temporaries: list[Path]) -> Path:
    """Write a temporary file in the target's folder, flushed to the disk."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporaries.append(temporary := Path(name))
    write(temporary)
    flush(temporary)
    temporary.chmod(0o666 & ~_umask())
    return temporary


def remove_all(temporaries: list[Path]) -> None:
    for temporary in temporaries:
        temporary.unlink(missing_ok=True)


def keep_beside(target: Path, temporaries: list[Path]) -> Path | None:
    """Give a file that is about to be replaced a second, temporary name, where the file system can."""
    second = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    try:
        second.unlink(missing_ok=True)
        os.link(target, second)
    except OSError:
        return None
    temporaries.append(second)
    return second


def flush(path: Path) -> None:
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

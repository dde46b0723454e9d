"""The cache of decompositions: a folder of memory-mapped safetensors files, named by what they were computed from.

An entry's name is a digest of the weight's bytes, shape and dtype, the request and the algorithm's version, so nothing
in the cache is ever out of date.  Entries are written to a temporary name and renamed, so that processes may share the
folder without locks.  Each holds its own name and a checksum of all that it holds; both are compared whenever it is
read, and one that fails is deleted and computed anew.  Whoever asks for a weight's decomposition compares the factors
with the weight besides.

$SPECTUNE_CACHE moves the folder, and "off" or "0" does without; else it is $SPECTUNE_HOME/decompositions or
$XDG_CACHE_HOME/spectune/decompositions (~/.cache by default).  $SPECTUNE_CACHE_BYTES bounds its size, 20 GB by default:
the entries used longest ago go first, by the second in the time of modification, which travels with a copy of the file,
and within one second by the time of the inode's last change, which no program sets.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.home import cache_dir
from spectune.reading import open_tensors
from spectune.spectral._hash import tensors_digest
from spectune.spectral._types import Request
from spectune.storage import collect_temporaries, save_tensors, temporary_beside

VERSION = 2  # of the algorithms: raised whenever results change by more than rounding
DEFAULT_BYTES = 20 * 10**9

_ENTRY = re.compile("[0-9a-f]{64}")
_warned = threading.Event()


class Entry(NamedTuple):
    """One cached decomposition.

    Args:
        key: the entry's name.
        kind: "top", "bottom", "full" or "one_sided".
        rank: triplets, None where all.
        shape: of the weight (out, in).
        bytes: on disk.
        used: when it was last read or written, in whole seconds since the epoch.
        path: the file.
    """

    key: str
    kind: str
    rank: int | None
    shape: tuple[int, int]
    bytes: int
    used: float
    path: Path


def directory() -> Path | None:
    """Return the cache's folder, which need not exist yet, or None where the cache is off."""
    named = os.environ.get("SPECTUNE_CACHE")
    if named:
        return None if named.lower() in ("off", "0") else Path(named).expanduser()
    return cache_dir() / "decompositions"


def limit() -> int:
    """Return the bytes that the cache may take.

    Raises:
        SpectuneError: $SPECTUNE_CACHE_BYTES is not a whole number.
    """
    text = os.environ.get("SPECTUNE_CACHE_BYTES", str(DEFAULT_BYTES))
    if not text.isdecimal():
        raise SpectuneError(f"SPECTUNE_CACHE_BYTES must be a whole number of bytes, not {text!r}")
    return int(text)


def key(weight_digest: str, request: Request) -> str:
    """Return an entry's name.  Results that come out the same up to rounding share one."""
    # all of a spectrum is what it is, whoever asks: a rank or a tolerance would only keep it twice
    asked = (request.kind,)
    if request.kind in ("top", "bottom"):
        asked = (request.kind, request.rank, request.tol, request.certify)
    return hashlib.sha256(f"{VERSION} {weight_digest} {asked}".encode()).hexdigest()


def load(name: str, folder: Path) -> dict[str, Tensor] | None:
    """Return an entry's tensors, mapped and not copied, or None where there is no sound one; a damaged one goes."""
    path = _path(name, folder)
    try:
        tensors = _read(path)
    except FileNotFoundError:
        return None
    if tensors is None:
        _remove(path)
    return tensors


def discard(name: str, folder: Path) -> None:
    """Delete an entry."""
    _remove(_path(name, folder))


def store(name: str, tensors: dict[str, Tensor], shape: tuple[int, int], request: Request, folder: Path) -> bool:
    """Write an entry and return whether it could be; where it could not, warn once a process."""
    path = _path(name, folder)
    metadata = {
        "key": name,
        "checksum": tensors_digest(tensors),
        "kind": request.kind,
        "rank": "" if request.rank is None else str(request.rank),
        "shape": f"{shape[0]} {shape[1]}",
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            save_tensors(tensors, temporary, metadata)
            _note_use(temporary)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        # Windows refuses to replace a file that another process has mapped
        if isinstance(error, PermissionError) and _is_sound(path):  # another process wrote it first and has it open
            return True
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"decompositions are not cached: {folder} cannot be written ({error}); free some space, or set "
                "SPECTUNE_CACHE to another folder or to 'off'",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return True


def ls(folder: Path | None = None) -> list[Entry]:
    """Return the entries, the most recently used first."""
    entries = []
    for path, status in sorted(_stats(folder), key=_recency, reverse=True):
        try:
            with open_tensors(path) as file:
                about: dict[str, str] = file.metadata() or {}
            rows, columns = about["shape"].split()
            rank = int(about["rank"]) if about["rank"] else None
            shape = (int(rows), int(columns))
            used = float(status.st_mtime_ns // 10**9)
            entries.append(Entry(path.stem, about["kind"], rank, shape, status.st_size, used, path))
        except (OSError, SafetensorError, KeyError, ValueError):  # gone meanwhile, or damaged: `verify` removes it
            continue
    return entries


def prune(max_bytes: int | None = None, folder: Path | None = None) -> list[str]:
    """Delete the entries used longest ago until the rest take at most `max_bytes`, and what killed writers left.

    Args:
        max_bytes: None is the limit that $SPECTUNE_CACHE_BYTES sets; 0 empties the cache.
        folder: None is the folder in use.

    Returns:
        The names of the deleted entries.
    """
    allowed = limit() if max_bytes is None else max_bytes
    removed = []
    for path, status in sorted(_stats(folder), key=_recency, reverse=True):
        allowed -= status.st_size
        if allowed < 0:
            _remove(path)
            removed.append(path.stem)
    for place in _places(folder):
        collect_temporaries(place)
    return removed


def verify(folder: Path | None = None) -> list[str]:
    """Read every entry, delete those whose checksum fails, and return their names; they will be computed anew."""
    damaged = []
    for path in _files(folder):
        try:
            tensors = _read(path, used=False)
        except FileNotFoundError:  # evicted meanwhile
            continue
        if tensors is None:
            _remove(path)
            damaged.append(path.stem)
    return damaged


def _read(path: Path, used: bool = True) -> dict[str, Tensor] | None:
    """Return a file's tensors, or None where it is damaged, or the entry of another name.

    Args:
        path: the file.
        used: whether someone needs it, so that the time is noted.
    """
    try:
        with open_tensors(path) as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
        # the seal: a file that was cut short, copied over another name or changed by a bit is none, whatever
        # safetensors says of it. A digest of all bytes is as fast as reading them
        if about.get("key") != path.stem or about.get("checksum") != tensors_digest(tensors):
            return None
        if used:
            with suppress(OSError):  # read-only: eviction goes by the time of writing
                _note_use(path)
        return tensors
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None


def _is_sound(path: Path) -> bool:
    try:
        return _read(path) is not None
    except FileNotFoundError:
        return False


def _note_use(path: Path) -> None:
    # whole seconds, which every file system and every copy of a folder keeps; with fractions a copy would have another
    # order
    now = int(time.time()) * 10**9
    os.utime(path, ns=(now, now))


def _recency(found: tuple[Path, os.stat_result]) -> tuple[int, int, str]:
    """Order entries by when they were used, and those that no stamp tells apart by name, so that all agree."""
    path, status = found
    return status.st_mtime_ns // 10**9, status.st_ctime_ns, path.name


def _path(name: str, folder: Path) -> Path:
    return folder / name[:2] / f"{name}.safetensors"


def _places(folder: Path | None) -> list[Path]:
    folder = directory() if folder is None else folder
    if folder is not None and folder.exists() and not folder.is_dir():
        raise SpectuneError(f"the cache's folder {folder} is no folder: give another by --cache or SPECTUNE_CACHE")
    return [] if folder is None else sorted(folder.glob("??"))


def _files(folder: Path | None) -> list[Path]:
    """Return the entries: what has another name in the folder, such as an adapter, is not the cache's to delete."""
    found = [path for place in _places(folder) for path in sorted(place.glob("*.safetensors"))]
    return [path for path in found if _ENTRY.fullmatch(path.stem) and path.stem.startswith(path.parent.name)]


def _stats(folder: Path | None) -> Iterator[tuple[Path, os.stat_result]]:
    for path in _files(folder):
        try:
            yield path, os.stat(path)
        except OSError:  # gone meanwhile
            continue


def _remove(path: Path) -> None:
    with suppress(OSError):  # read-only, or open in another process where that forbids it
        path.unlink(missing_ok=True)

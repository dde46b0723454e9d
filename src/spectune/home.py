"""Where spectune keeps what it need not make twice."""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from spectune.errors import SpectuneError


def cache_dir() -> Path:
    """Return the folder for what spectune keeps between runs: $SPECTUNE_HOME, or spectune in the XDG cache.

    Raises:
        SpectuneError: neither is set, and the user has no home, as in a container without an entry for the user.
    """
    home = os.environ.get("SPECTUNE_HOME")
    try:
        if home:
            return Path(home).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spectune"
    except RuntimeError:
        raise SpectuneError("there is no home directory to keep things in: set SPECTUNE_HOME to a folder") from None


def temporary_file(owner: object) -> BinaryIO:
    """Return a file without a name, where there is room: in the cache's folder, or else where the system has its own.

    Args:
        owner: when it goes the file does, and with its process, however that ends.
    """
    folder = cache_dir()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    place = folder if os.access(folder, os.W_OK) else None
    file = cast(BinaryIO, tempfile.TemporaryFile(dir=place))  # noqa: SIM115 (the owner closes it)
    weakref.finalize(owner, file.close)
    return file

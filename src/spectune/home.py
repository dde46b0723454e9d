"""Where spectune keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path

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

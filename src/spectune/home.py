"""Where spectune keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder for what spectune keeps between runs: $SPECTUNE_HOME, or spectune in the XDG cache."""
    home = os.environ.get("SPECTUNE_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spectune"

"""When the heap of glibc gives memory back to the system; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

# of glibc's malloc.h: blocks from this size on are the system's, and more than this free at the end of the heap is
# given back; either as an environment variable is the user's own word
_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30)}


def keep_memory() -> None:
    """Have the heap of glibc keep what a step frees for the next one, which would get it back a page at a time."""
    for name, setting in _SETTINGS.items():
        if name not in os.environ:
            _of_glibc("mallopt")(*setting)


def release_memory() -> None:
    """Give memory that is free in the heap of glibc back to the system."""
    _of_glibc("malloc_trim")(0)


@cache
def _of_glibc(name: str) -> Callable[..., int]:
    """Return a function of glibc, or where there is none one that does nothing."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return lambda *args: 0

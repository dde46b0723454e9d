"""When the heap of glibc gives memory back to the system; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

from spectune.shared import WhileNeeded

# of glibc's malloc.h: blocks from this size on are the system's, and more than this free at the end of the heap is
# given back; while memory is kept, and as glibc has them at first. As environment variables they are the user's own
# word.
_SETTINGS = tuple(
    (number, kept, 128 << 10)
    for name, number, kept in (("MALLOC_MMAP_THRESHOLD_", -3, 32 << 20), ("MALLOC_TRIM_THRESHOLD_", -1, 1 << 30))
    if name not in os.environ
)


def _keep() -> Callable[[], None]:
    for number, kept, _ in _SETTINGS:
        _of_glibc("mallopt")(number, kept)

    def give_back() -> None:
        for number, _, usual in _SETTINGS:
            _of_glibc("mallopt")(number, usual)
        release_memory()

    return give_back


# the heap of glibc keeps what a step frees for the next one, which would get it back a page at a time
memory_kept = WhileNeeded(_keep)


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

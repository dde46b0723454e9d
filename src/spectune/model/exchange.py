"""Attributes of a module that contexts take the place of, in any order and in any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch.nn as nn

_lock = Lock()
_taken: dict[tuple[int, str], list[Any]] = {}  # by module and name: how many contexts, what is there, what was


@contextmanager
def exchanged(
    module: nn.Module, name: str, wrap: Callable[[Callable[..., object]], Callable[..., object]]
) -> Iterator[None]:
    """Within the context have `wrap` of a method take its place; the last context to be left puts it back.

    All contexts share what the first one put there, which must find out for itself which context it is called in.
    """
    held, key = vars(module), (id(module), name)
    with _lock:
        entry = _taken.get(key)
        if entry is None:
            entry = _taken[key] = [0, wrap(getattr(module, name)), held.get(name)]
            held[name] = entry[1]
        entry[0] += 1
    try:
        yield
    finally:
        with _lock:
            entry[0] -= 1
            if not entry[0]:
                del _taken[key]
                if held.get(name) is entry[1]:
                    del held[name]
                    if entry[2] is not None:
                        held[name] = entry[2]

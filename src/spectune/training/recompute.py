"""Activation checkpointing in a run, and when its memory goes back to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from spectune.layers.recompute import keep_products

# of glibc's malloc.h: blocks from this size on are the system's, and more than this free at the end of the heap is
# given back; either as an environment variable is the user's own word
_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30)}


def checkpoint_activations(model: Any, how: bool | Literal["light"]) -> None:
    """Have a model of transformers compute activations again in the backward pass.

    Args:
        model: the model; one that cannot is left alone by "light".
        how: "light" keeps the products of linear layers, True only what goes into each block, False everything.
    """
    light = how == "light"
    if not how or (light and not model.supports_gradient_checkpointing):
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if light:
        options["context_fn"] = keep_products
    _named(model, "enable")(options)


def keep_activations(model: Any) -> None:
    """Undo `checkpoint_activations`."""
    _named(model, "disable")()


def _named(model: Any, action: str) -> Callable[..., None]:
    """Return the model's own method, under its new name where transformers has it."""
    new, old = f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}"
    return getattr(model, new, None) or getattr(model, old)


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

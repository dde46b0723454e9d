"""Activation checkpointing in a run, and memory that goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from spectune.layers.recompute import keep_products


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


def release_memory() -> None:
    """Give memory that is free in the heap of glibc back to the system; elsewhere nothing happens."""
    _malloc_trim()(0)


@cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return lambda pad: 0

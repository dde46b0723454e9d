"""The adapters on a model by name, and the sentences for names that are not there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch.nn as nn

from spectune.errors import SpectuneError, nearest
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.selection import replaced
from spectune.layers.updates import Update, updates_in
from spectune.layers.whole import Part, parts_of
from spectune.methods import Method

M = TypeVar("M", bound=nn.Module)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model."""
    return names_on(parts_of(model))


def method_of(update: Update) -> Method:
    """Return an update's method, of which the layer itself knows only what it asks of it."""
    assert isinstance(update.method, Method)
    return update.method


def updates_of(layer: Adapted, name: str) -> list[Update]:
    """Return the terms of an adapter on a layer."""
    return list(updates_in(layer.adapters, name)) if name in layer.adapters else []


def names_on(layers: Mapping[str, Part]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))


def check_some_adapter(parts: Mapping[str, Part]) -> None:
    if not parts:
        raise SpectuneError("the model has no adapter: call spectune.adapt or spectune.attach first")
    check_not_replaced(parts)


def check_not_replaced(parts: Mapping[str, Part]) -> None:
    """Raise where a part that was adapted is gone, as the output embedding is after resize_token_embeddings.

    Args:
        parts: all of a model's, by name.
    """
    for selection in {part.selection for part in parts.values()}:
        for name in selection.lost(parts):
            raise SpectuneError(replaced(name))


def check_own_weights(layers: Mapping[str, Adapted]) -> None:
    for layer in layers.values():
        if layer.fused is not None:
            layer.fused.check_own_weight()


def check_known_on(model: nn.Module, name: str) -> None:
    check_known(name, adapter_names(model))


def check_known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        there = ", ".join(names) if names else "none"
        raise SpectuneError(f"no adapter {name!r} is on the model{nearest(name, names)} (there: {there})")


def check_new_name(model: nn.Module, name: str) -> None:
    check_own_weights(adapted_layers(model))
    check_not_replaced(parts_of(model))
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise SpectuneError(f"{name!r} cannot be an adapter's name; use letters, digits, '-' and '_'")
    if name in adapter_names(model):
        raise SpectuneError(f"an adapter {name!r} is on the model already; choose another name or detach it first")

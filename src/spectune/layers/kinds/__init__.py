"""Layers that multiply by a matrix and are no linear layers, one file for each kind."""

from __future__ import annotations

import torch.nn as nn

from spectune.layers.kinds.base import Kind, Vectors
from spectune.layers.kinds.convolution import Convolution, GroupedConvolution
from spectune.layers.kinds.embedding import Bag, Lookup

LINEAR = "linear"
KINDS: tuple[Kind, ...] = (Convolution(), GroupedConvolution(), Lookup(), Bag())

__all__ = ["KINDS", "LINEAR", "Kind", "Vectors", "kind_named", "kind_of"]


def kind_of(layer: nn.Module) -> Kind | None:
    """Return the kind of a layer; None of a linear layer, and of what is no layer that multiplies by a matrix."""
    return next((kind for kind in KINDS if kind.takes(layer)), None)


def kind_named(name: str) -> Kind:
    """Return the kind of this name."""
    return next(kind for kind in KINDS if kind.name == name)

"""Linear layers, and those of other kinds, that become adapted ones in place, and the plain ones again."""

from __future__ import annotations

from abc import ABC, ABCMeta
from functools import cache
from typing import cast

import torch.nn as nn
from transformers.pytorch_utils import Conv1D

from spectune.layers.adapted import Adapted
from spectune.layers.classes import change_class
from spectune.layers.kinds import KINDS
from spectune.layers.packed import is_packed
from spectune.layers.parts import PartLinear
from spectune.layers.reads import called
from spectune.layers.selection import Selection
from spectune.layers.unfolded import Unfolded
from spectune.layers.values import WeightValues

_OTHERS = {plain for kind in KINDS for plain in kind.classes}  # classes of layers that are no linear ones
_WITHOUT_BIAS = (nn.Embedding, nn.EmbeddingBag)


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that adds updates to `kind`: a subclass of it, so that isinstance goes on holding.

    Where the forward pass of `kind` goes around that of its superclass, as `super().forward(x) * 2` does, it goes
    around the adapted one: W' in the place of W, and not an update beside the answer.
    """
    plain, own = _own_forwards(kind)
    other = plain in _OTHERS
    around = bool(own) and all(_goes_around(forward) for forward in own)
    # behind the class itself where that calls super().forward and does something more with the answer; before it
    # elsewhere, so that its own forward is the frozen layer's
    under: tuple[type, ...] = (kind, adapted_class(plain)) if around else (Unfolded if other else Adapted, kind)
    if isinstance(kind, ABCMeta):  # whose instances change their class only to one that is abstract first
        under = (_Abstract, *under)
    values = {
        "__module__": kind.__module__,
        "plain_class": kind,
        "made_by": (adapted_class, kind),
        "is_plain": not other and (around or not own),
        "is_packed": False,
        "is_transposed": plain is Conv1D,
    }
    if plain in _WITHOUT_BIAS:
        values["bias"] = None
    return type(f"Adapted{kind.__name__}", under, values)


class _Abstract(ABC):  # noqa: B024
    pass


def answers_otherwise(layer: nn.Module) -> bool:
    """Whether a layer that is no linear one has a forward method of its own that is more than its class's around it."""
    return not all(map(_goes_around, _own_forwards(type(layer))[1]))


def _own_forwards(kind: type[nn.Module]) -> tuple[type[nn.Module], list[object]]:
    """Return the known class that a layer's class is made from, and the forward methods that come before its own."""
    plain = next(c for c in kind.__mro__ if c in (nn.Linear, Conv1D) or c in _OTHERS)
    return plain, [vars(c)["forward"] for c in kind.__mro__[: kind.__mro__.index(plain)] if "forward" in vars(c)]


def _goes_around(forward: object) -> bool:
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return {"super", "forward"} <= set(names) and "weight" not in names


def take_over(layer: nn.Module, name: str, selection: Selection) -> Adapted:
    """Make a layer an adapted one, in place, without touching its parameters."""
    packed = is_packed(layer)
    # the class and not the module: names, tied weights, hooks, optimizers' references and isinstance stay what they
    # are, and detaching is giving the class back
    change_class(layer, adapted_class(type(layer)))
    adapted = cast(Adapted, layer)
    if packed:
        adapted.is_plain, adapted.is_packed = False, True
    adapted.adapted_as = name
    adapted.adapters, adapted.bases = nn.ModuleDict(), nn.ModuleDict()
    adapted.selection = selection
    adapted.fused = None
    adapted.weight_values = WeightValues()
    adapted.prepared = None, []
    adapted.is_called = layer in called
    selection.joined_by(adapted, name)
    if isinstance(layer, PartLinear):
        layer.join()
    return adapted


def give_back(layer: Adapted) -> None:
    """Make an adapted layer the plain one it was."""
    layer.selection.left_by(layer)
    if layer.fused is not None:
        layer.fused.end()
    layer.weight_values.end()
    del layer.adapters, layer.bases, layer.selection, layer.prepared, layer.adapted_as, layer.fused, layer.weight_values
    vars(layer).pop("is_called", None)
    if layer.is_packed:
        del layer.is_plain, layer.is_packed
    change_class(layer, layer.plain_class)
    if isinstance(layer, PartLinear):
        layer.leave()

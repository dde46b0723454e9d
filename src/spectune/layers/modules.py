"""The linear layers of a model: nn.Linear and transformers' Conv1D."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from spectune.errors import SpectuneError, nearest


def is_linear(module: nn.Module) -> bool:
    """Whether a module is of a kind that can be adapted."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is a Conv1D, whose weight is stored (in x out)."""
    return isinstance(module, Conv1D)


def effective_weight(layer: nn.Module) -> Tensor:
    """Return W (out x in) of a linear layer; a view, transposed for Conv1D."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(layer) else weight


def find_linear(model: nn.Module, name: str) -> nn.Module:
    """Return the linear layer of this name in a model.

    Raises:
        SpectuneError: there is none; the nearest names are listed.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if found is None or not is_linear(found):
        linears = [n for n, m in model.named_modules() if is_linear(m)]
        raise SpectuneError(f"the model has no linear layer {name!r}{nearest(name, linears)}")
    return found

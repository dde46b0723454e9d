"""Modules that change their class while they are adapted."""

from __future__ import annotations

from types import MethodType

import torch.nn as nn


def change_class(layer: nn.Module, to: type[nn.Module]) -> None:
    """Change a module's class, and what wrappers such as accelerate's hooks keep of its forward method."""
    before = type(layer).forward
    layer.__class__ = to
    # accelerate keeps the bound method that it wraps, which would go on calling the forward of the class before
    for name, value in vars(layer).items():
        if getattr(value, "__self__", None) is layer and getattr(value, "__func__", None) is before:
            vars(layer)[name] = MethodType(to.forward, layer)

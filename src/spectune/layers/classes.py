"""Modules that change their class while they are adapted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch.nn as nn

from spectune.errors import SpectuneError


def change_class(layer: nn.Module, to: type[nn.Module]) -> None:
    """Change a module's class, and what wrappers such as accelerate's hooks keep of its forward method."""
    before = type(layer).forward
    layer.__class__ = to
    # accelerate keeps the bound method that it wraps, which would go on calling the forward of the class before
    for name, value in vars(layer).items():
        if getattr(value, "__self__", None) is layer and getattr(value, "__func__", None) is before:
            vars(layer)[name] = MethodType(to.forward, layer)


def check_free(name: str, module: nn.Module, mixed_in: type) -> None:
    """Raise where a module has attributes by the names that an adapted one keeps its own under.

    Args:
        name: the module's.
        module: the module.
        mixed_in: what is to be mixed into its class, which declares those names; nothing is said where it is by now.

    Raises:
        SpectuneError: there is such an attribute.
    """
    if isinstance(module, mixed_in):
        return
    own = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    taken = sorted(own & (_declared(mixed_in) - {"weight", "bias"}))
    if taken:
        raise SpectuneError(
            f"{name!r} ({type(module).__name__}) has {taken[0]!r} of its own, where an adapter would be kept: "
            "rename it, or leave the module out"
        )


def _declared(mixed_in: type) -> set[str]:
    """Return the attributes that a class and those of ours that it is made from declare."""
    return {
        name for kind in mixed_in.__mro__ if issubclass(kind, Remade) for name in vars(kind).get("__annotations__", ())
    }


Kind = type[nn.Module]
Maker = Callable[[Kind], Kind]


def made_of(kind: type) -> tuple[list[Maker], Kind]:
    """Return the functions that made a class at run time, the last one first, and the class that they began with.

    Each left in the class, as `made_by`, itself and the class that it was given.
    """
    makers: list[Maker] = []
    made = kind
    while "made_by" in vars(made):
        maker, made = vars(made)["made_by"]
        makers.append(maker)
    return makers, made


def without(kind: Kind, maker: Maker) -> Kind:
    """Return what a class would be if one of the functions that made it had not; others may have come after it."""
    makers, plain = made_of(kind)
    makers.remove(maker)
    return _made(makers, plain)


def blank(makers: Sequence[Maker], kind: Kind) -> nn.Module:
    """Return a module without a state, of the class that functions make of one."""
    cls: object = _made(makers, kind)
    return cls.__new__(cls)


def _made(makers: Sequence[Maker], kind: Kind) -> Kind:
    for maker in reversed(makers):
        kind = maker(kind)
    return kind


class Remade:
    """Mixed into classes that are made at run time: copies and pickles name the one that a class was made from."""

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        return blank, made_of(type(self)), *super().__reduce_ex__(protocol)[2:]

"""Weights that a model reads itself, past the layer's forward method: an adapter there would not be asked."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any
from weakref import WeakSet

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.values import PLAIN

# private methods, of which the code alone is compared: who asks for a weight is told by the frames in between.  A
# release of torch that renames one fails here, at import, and not silently
_CALL, _APPLY = nn.Module._call_impl.__code__, nn.Module._apply.__code__
# what takes of a tensor its kind alone, and no value
_OF_KIND = ("to", "type_as", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_FROM_FIRST = ("to", "type_as")  # of which the first argument gives its values
called: WeakSet[nn.Module] = WeakSet()  # layers that a trial of their model saw called, and not read past


def reader_of(layer: nn.Module, frame: FrameType | None, own: CodeType | None) -> nn.Module | None:
    """Return the module whose forward method, innermost, asks for a layer's weight; None where the layer does itself.

    Args:
        layer: the layer.
        frame: the innermost frame.
        own: the code of the layer's forward method.
    """
    while frame is not None:
        code = frame.f_code
        if code is own and frame.f_locals.get(code.co_varnames[0]) is layer:
            return None
        if code is _APPLY and frame.f_locals.get("self") is layer:  # moved, in a forward pass as well
            return None
        if code is _CALL and frame.f_locals.get("self") is layer:  # a hook, or a method put in the place of forward
            return layer if replaced_forward(layer) else None
        if code.co_name == "forward" and code.co_argcount:
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nn.Module) and module is not layer:
                return None if _moves(module) else module
        frame = frame.f_back
    return None


def _moves(module: nn.Module) -> bool:
    """Whether a module's forward method gathers the weights of those inside, as FSDP's does, and computes nothing."""
    return type(module).__module__.startswith("torch.distributed.")


def replaced_forward(layer: nn.Module) -> bool:
    """Whether a layer answers by a function of its own and no longer by its class's forward method."""
    forward = vars(layer).get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(layer).forward:
        return False
    # accelerate's hooks put a function of theirs in the place of forward, and ask the method that they found.  Without
    # this name of its, every offloaded layer would be taken for one that another library answers for
    wrapped = vars(layer).get("_old_forward")
    hooked = "_hf_hook" in vars(layer) and getattr(wrapped, "__self__", None) is layer
    return not (hooked and getattr(wrapped, "__func__", None) is type(layer).forward)


def takes_values(func: object, args: Any, result: object) -> bool:
    """Whether a function of torch made something of a tensor's values, and did not just look at its kind.

    Args:
        func: the function.
        args: for each of its arguments whether it is the tensor.
        result: what it returned.
    """
    name = getattr(func, "__name__", "")
    if name in _OF_KIND or name.startswith("new_"):
        return name in _FROM_FIRST and bool(args) and args[0]
    return any(isinstance(value, Tensor) for value in (result if isinstance(result, (tuple, list)) else (result,)))


class WatchedWeight(Tensor):
    """An adapted layer's weight as other modules see it in a forward pass: it tells its kind, and no values.

    Attributes:
        layer_name: the layer.
        made: returns the values that are to be had in its place, of a module that is brought whole; None refuses.
    """

    layer_name: str
    made: Callable[[], Tensor] | None
    # private in torch: the metaclass of parameters asks for it.  Without it `isinstance(weight, nn.Parameter)` is
    # False, by which models decide whether a layer has a weight at all
    _is_param = True  # so that isinstance takes it for the parameter

    @classmethod
    @torch.compiler.disable  # which a break in the code around leads into
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        def plain(value: object, of: Callable[[WatchedWeight], Tensor]) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(plain(v, of) for v in value) if type(value) in (list, tuple) else value
            return of(value) if isinstance(value, WatchedWeight) else value

        def asked(of: Callable[[WatchedWeight], Tensor]) -> Any:
            return func(*plain(list(args), of), **{k: plain(v, of) for k, v in (kwargs or {}).items()})

        with torch._C.DisableTorchFunctionSubclass():
            seen = [*args, *(kwargs or {}).values()]
            seen += [v for value in seen if isinstance(value, (list, tuple)) for v in value]
            weights = [value for value in seen if isinstance(value, WatchedWeight)]
            result = asked(lambda weight: weight.as_subclass(Tensor))
        if not weights or not takes_values(func, [isinstance(value, WatchedWeight) for value in args], result):
            return result
        for weight in weights:
            if weight.made is None:
                raise SpectuneError(bypassed(weight.layer_name))
        return asked(lambda weight: weight.made())  # type: ignore[misc]


def watched(weight: Tensor, layer_name: str, made: Callable[[], Tensor] | None = None) -> Tensor:
    """Return a weight that raises where values are taken of it, or has the values that are made then."""
    if type(weight) not in (Tensor, *PLAIN):
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        seen = weight.as_subclass(WatchedWeight)
    seen.layer_name, seen.made = layer_name, made
    return seen


def bypassed(name: str) -> str:
    """Return the sentence for a layer whose weight the model reads itself."""
    return (
        f"the model reads the weight of {name!r} itself instead of calling the layer, so that an adapter there has no "
        f"effect and gets no gradient: leave it out with exclude=[{name!r}]"
    )


@torch.library.custom_op("spectune::read_outside", mutates_args=())
def read_outside(weight: Tensor, layer_name: str) -> Tensor:
    """Return a weight that compiled code reads outside of the layer, as `watched` does: who takes values of it raises.

    What is only looked at (dtype, device, shape) is known when the code is compiled, and the operation is left out.
    """
    raise SpectuneError(bypassed(layer_name))


@read_outside.register_fake
def _(weight: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(weight)

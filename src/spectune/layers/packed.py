"""Weights that another library holds packed, in 4 or 8 bits: W as a tensor whose values are made when they are used.

bitsandbytes' 4-bit and 8-bit layers, and the weights of torchao and quanto.  The library is not imported here: whoever
has such a layer has it in memory.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from spectune.errors import SpectuneError
from spectune.layers.classes import Remade, change_class

_SUBCLASSES = ("torchao", "optimum")  # whose weights are tensors that know how to dequantize themselves
_REPACKING = "support_avx512bf16_for_cpu"  # lets bitsandbytes lay a weight out anew, and round its scales
_BLOCK_ROWS = 32  # that lie side by side there


class Packed(Tensor):
    """W (out x in) as its library dequantizes it: of that shape and dtype, and in memory only while it is used.

    Every operation makes the values anew and lets go of them; nothing can be written.

    Args:
        held: the layer's parameter.
        values: returns W, given the parameter.
        shape: of W.
        dtype: of W.
    """

    held: Tensor
    values: Callable[[object], Tensor]

    @staticmethod
    def __new__(
        cls, held: Tensor, values: Callable[[object], Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Packed:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=held.device)
        made.held, made.values = held, values
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def dense(self) -> Tensor:
        """Return W as a plain tensor of its own."""
        return self.values(self.held).detach().to(self.dtype)

    @property
    def rounds_scales(self) -> bool:
        """Whether some processors round the weight's scales to bf16 when its layer first answers."""
        return self.values is _of_4_bits

    @property
    def lend(self) -> Callable[[Tensor], Tensor]:
        """Make of the parameter this tensor again, without holding the parameter."""
        return partial(_again, self.values, self.shape, self.dtype)

    def __repr__(self) -> str:
        return f"Packed({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        return self.dense()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0].lend(args[0].held)
        given = zip(func._schema.arguments, args, strict=False)
        if any(isinstance(value, Packed) and a.alias_info is not None and a.alias_info.is_write for a, value in given):
            raise SpectuneError("a packed weight cannot be written to: dequantize the model first")
        args, kwargs = tree_map_only(Packed, Packed.dense, (args, kwargs))
        return func(*args, **kwargs)


def _again(values: Callable[[object], Tensor], shape: Sequence[int], dtype: torch.dtype, held: Tensor) -> Packed:
    return Packed(held, values, shape, dtype)


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed in a way that is known here."""
    return packed_weight(layer) is not None


def packed_weight(layer: nn.Module) -> Packed | None:
    """Return W (out x in) of a layer whose weight is packed in a way that is known here, else None.

    Raises:
        SpectuneError: it is one of bitsandbytes' that is not packed yet.
    """
    packed = _packed_alone(layer)
    if packed is None or not isinstance(layer, Beside):
        return packed
    values = partial(_with_low_rank, layer.left, layer.right, packed.values)
    return Packed(packed.held, values, packed.shape, packed.dtype)


def _packed_alone(layer: nn.Module) -> Packed | None:
    weight: Any = layer._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter:
        return None
    kind = type(weight)
    if kind.__name__ == "Params4bit":
        if weight.quant_state is None:
            raise _unpacked(layer)
        return Packed(weight, _of_4_bits, weight.quant_state.shape, weight.quant_state.dtype)
    if kind.__name__ == "Int8Params" and not weight.has_fp16_weights:
        state: Any = layer.state
        scales = state.SCB if weight.SCB is None else weight.SCB
        if scales is None or weight.dtype != torch.int8:
            raise _unpacked(layer)
        bias = layer._parameters.get("bias")
        dtype = torch.float32 if bias is None else bias.dtype
        return Packed(weight, partial(_of_8_bits, scales), weight.shape, dtype)
    if kind.__module__.partition(".")[0] in _SUBCLASSES and hasattr(kind, "dequantize"):
        return Packed(weight, kind.dequantize, weight.shape, weight.dtype)
    return None


class Beside(Remade):
    """Mixed into the class of a packed layer: its W is what is packed and L R, which is held as it is."""

    left: Tensor
    right: Tensor

    def forward(self, x: Tensor) -> Tensor:
        more = F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))
        return super().forward(x) + more  # type: ignore[misc]


@cache
def beside_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of packed layers with a low-rank part of W beside: a subclass, so that isinstance holds."""
    members = {"__module__": kind.__module__, "made_by": (beside_class, kind)}
    return type(f"LowRank{kind.__name__}", (Beside, kind), members)


def put_beside(layer: nn.Module, left: Tensor, right: Tensor) -> None:
    """Add L (out x r) R (r x in) to the W of a packed layer, in place."""
    change_class(layer, beside_class(type(layer)))
    layer.register_buffer("left", left)
    layer.register_buffer("right", right)


def _with_low_rank(left: Tensor, right: Tensor, values: Callable[[object], Tensor], held: object) -> Tensor:
    dense = values(held)
    wide = torch.promote_types(dense.dtype, torch.float32)
    return torch.addmm(dense.to(wide), left.to(wide), right.to(wide)).to(dense.dtype)


def _unpacked(layer: nn.Module) -> SpectuneError:
    return SpectuneError(
        f"a {type(layer).__name__} has not packed its weight yet, which bitsandbytes does when the model is moved: "
        "call model.to(device) first"
    )


def _bitsandbytes() -> Any:
    return sys.modules["bitsandbytes"].functional


@torch.no_grad()
def _of_4_bits(weight: Any) -> Tensor:
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # laid out for this processor's instructions
        data, state = _bitsandbytes()._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return _bitsandbytes().dequantize_4bit(data, state)


@torch.no_grad()
def _of_8_bits(scales: Tensor, weight: Any) -> Tensor:
    return weight.data.float().mul_(scales.float()[:, None].to(weight.device) / 127.0)


def packed_product(x: Tensor, layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a packed layer's own forward method answers, with the gradient of x: that of x W^T, dequantized.

    Not every library's forward method has gradients, and some keep x for them.

    Args:
        x: (..., in).
        layer: the layer.
        forward: its own forward method.
    """
    return _PackedProduct.apply(x, layer, forward)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), weight = grads, packed_weight(ctx.layer)
        assert weight is not None
        return (grad @ weight.dense().to(grad.dtype)).to(ctx.dtype), None, None


def packed_again(layer: Any, weight: Tensor) -> nn.Parameter:
    """Return another weight (out x in) packed as a layer packs its own.

    Args:
        layer: with a packed weight, which is left as it is and can be put back.
        weight: what to pack.

    Raises:
        SpectuneError: how it was packed is not known here.
    """
    held, kind = layer._parameters["weight"], type(layer._parameters["weight"])
    module: nn.Module = layer
    if isinstance(module, Beside):
        weight = weight - (module.left.to(weight.dtype) @ module.right.to(weight.dtype))
    if kind.__name__ == "Params4bit":
        options = {key: getattr(held, key) for key in ("blocksize", "compress_statistics", "quant_type")}
        own = held.quant_state
        made = kind(weight.to(own.dtype), requires_grad=False, quant_storage=held.quant_storage, **options)
        return made.to(held.device)
    if kind.__name__ == "Int8Params":
        state = layer.state
        if held.SCB is None:  # the layer has taken the scales from its weight; they are given back with it
            held.CB, held.SCB = held.data, state.SCB
        state.CB = state.SCB = None
        return kind(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(held.device)
    raise SpectuneError(f"how {kind.__module__.partition('.')[0]} packed it is not known")


def keep_layout(model: nn.Module, keep: bool) -> None:
    """Have bitsandbytes leave weights laid out as they are, or again do as it likes.

    Where a processor has instructions for another layout it lays a weight out anew in evaluation mode: its scales are
    rounded, and no gradient goes through it any more.
    """
    for module in model.modules():
        held = vars(module)
        if keep and held.get(_REPACKING):
            held[_REPACKING] = None  # as false as False, and tells what it was
        elif not keep and held.get(_REPACKING, False) is None:
            held[_REPACKING] = True


def unpack_new_heads(model: nn.Module) -> None:
    """Make plain linear layers of those that the checkpoint lacked: transformers initializes them and packs nothing."""
    for module in model.modules():
        ours = isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes")
        if ours and type(module.weight) is nn.Parameter and module.weight.is_floating_point():
            change_class(module, nn.Linear)


def keep_odd_layouts(model: nn.Module) -> None:
    """Have bitsandbytes leave for good the weights whose sides its other layout does not divide: it fails on them."""
    for module in model.modules():
        if vars(module).get(_REPACKING) and isinstance(weight := packed_weight(module), Packed):
            held: Any = weight.held
            if weight.shape[0] % _BLOCK_ROWS or weight.shape[1] % held.quant_state.blocksize:
                vars(module)[_REPACKING] = False


@contextmanager
def kept_layout(model: nn.Module) -> Iterator[None]:
    """Within the context every packed weight of a model stays laid out as it is."""
    before = any(vars(module).get(_REPACKING, False) is None for module in model.modules())
    keep_layout(model, True)
    try:
        yield
    finally:
        if not before:
            keep_layout(model, False)

"""Weights in 4 and 8 bits that are floating-point numbers, with scales of blocks, rows or whole tensors beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectune.spectrum.integers import mlx_says
from spectune.spectrum.stored import Stored, Unpacked

_FP8 = ("F8_E4M3", "F8_E5M2")
_POWERS = ("U8", "F8_E8M0")  # as which powers of two are stored: by their exponent, plus 127
_BLOCK = 128  # rows and columns that share a scale, the last ones of which may be fewer
_MX, _NV = 32, 16  # values that share a scale
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def fp8_blocks(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """8-bit floats with a scale for each block: `weight_scale_inv`, and compressed-tensors' `weight_scale`."""
    scale = by_name.get(f"{tensor.name}_scale_inv") or by_name.get(f"{tensor.name}_scale")
    if tensor.dtype not in _FP8 or scale is None or len(tensor.shape) != 2 or len(scale.shape) != 2:
        return None
    if scale.shape[1] == 1 and scale.name.endswith("_scale"):
        return None  # of rows
    found = [_block(size, count) for size, count in zip(tensor.shape, scale.shape, strict=True)]
    sides = [side for side in found if side is not None]
    if len(sides) < 2 or not (scale.floating or scale.dtype in _POWERS):
        return None

    def read(index: int | None) -> Tensor:
        weight, factors = tensor.read(None).float(), _values(scale.read(None))
        for dim, side in enumerate(sides):
            factors = factors.repeat_interleave(side, dim).narrow(dim, 0, weight.shape[dim])
        return weight.mul_(factors.float()).to(factors.dtype)

    return Unpacked(tensor._replace(floating=True, read=read), (scale.name,))


def _block(size: int, count: int) -> int | None:
    if -(-size // _BLOCK) == count:
        return _BLOCK
    return size // count if count and size % count == 0 else None


def by_row(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """8-bit floats and whole numbers with a scale for each row, or one for all: `weight_scale`."""
    scale = by_name.get(f"{tensor.name}_scale")
    if tensor.dtype not in (*_FP8, "I8") or scale is None or not scale.floating or len(tensor.shape) != 2:
        return None
    if scale.shape not in ((), (1,), (1, 1), (tensor.shape[0], 1)) or f"{tensor.name}_zero_point" in by_name:
        return None

    def read(index: int | None) -> Tensor:
        factors = scale.read(None)
        return tensor.read(None).to(factors.dtype) * factors

    return Unpacked(tensor._replace(floating=True, read=read), (scale.name,))


def mxfp4_experts(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """GPT-OSS' MXFP4 experts: `_blocks` (experts x out x groups x bytes) and `_scales`, loaded transposed."""
    name = tensor.name.removesuffix("_blocks")
    scale = by_name.get(f"{name}_scales")
    if name == tensor.name or scale is None or (tensor.dtype, scale.dtype) != ("U8", "U8"):
        return None
    if len(tensor.shape) != 4 or tensor.shape[:3] != scale.shape:
        return None
    experts, rows, groups, width = tensor.shape

    def read(index: int | None) -> Tensor:
        values = _fp4(tensor.read(index)) * _values(scale.read(index))[..., None]
        return values.to(torch.bfloat16).flatten(-2).mT.contiguous()

    return Unpacked(Stored(name, (experts, 2 * width * groups, rows), "MXFP4", True, read), (scale.name,))


def fp4(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """compressed-tensors' NVFP4 and MXFP4: `weight_packed` (out x in / 2), `weight_scale`, and NVFP4's `_global_scale`.

    The scale of a group of NVFP4 is its own 8-bit float divided by the whole tensor's; MXFP4's is a power of two.
    """
    name = tensor.name.removesuffix("_packed")
    scale, whole = by_name.get(f"{name}_scale"), by_name.get(f"{name}_global_scale")
    if name == tensor.name or scale is None or tensor.dtype != "U8" or len(tensor.shape) != 2:
        return None
    rows, inputs = tensor.shape[0], 2 * tensor.shape[1]
    nvidia = scale.dtype == "F8_E4M3" and whole is not None and whole.floating and whole.shape in ((), (1,))
    size = _NV if nvidia else _MX
    if scale.shape != (rows, inputs // size) or inputs % size or not (nvidia or scale.dtype in _POWERS):
        return None

    def read(index: int | None) -> Tensor:
        factors = _values(scale.read(None))
        factors = factors if whole is None else factors / whole.read(None)
        return (_fp4(tensor.read(None)).unflatten(1, (-1, size)) * factors[..., None]).flatten(1).to(torch.bfloat16)

    used = [scale.name] + [n for key in ("global_scale", "shape") if (n := f"{name}_{key}") in by_name]
    return Unpacked(Stored(name, (rows, inputs), "NVFP4" if nvidia else "MXFP4", True, read), tuple(used))


def modelopt(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """modelopt's NVFP4: `weight` (out x in / 2), `weight_scale`, and `weight_scale_2`, the whole tensor's.

    Experts in one tensor keep their own layout, (experts x in / 2 x out).
    """
    owner = tensor.name if tensor.name.endswith("weight") else f"{tensor.name}_weight"
    scale, whole = by_name.get(f"{owner}_scale"), by_name.get(f"{owner}_scale_2")
    if scale is None or whole is None or not whole.floating or (tensor.dtype, scale.dtype) != ("U8", "F8_E4M3"):
        return None
    axis = 1 if len(tensor.shape) == 3 else -1  # along which values lie side by side in a byte
    if len(tensor.shape) not in (2, 3) or whole.shape not in ((), (1,)):
        return None
    inputs = 2 * tensor.shape[axis]
    shapes = [(*t.shape[:axis], inputs, *t.shape[axis:][1:]) for t in (tensor, scale)]
    if shapes[0] != shapes[1] or inputs != _NV * scale.shape[axis]:
        return None

    def read(index: int | None) -> Tensor:
        packed, factors = (t.read(index).mT if axis == 1 else t.read(index) for t in (tensor, scale))
        factors = _values(factors) * whole.read(None)
        made = (_fp4(packed).unflatten(-1, (-1, _NV)) * factors[..., None]).flatten(-2)
        return made.mT.contiguous() if axis == 1 else made

    return Unpacked(Stored(tensor.name, shapes[0], "NVFP4", True, read), (scale.name, whole.name))


def mlx_floats(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """MLX in the modes mxfp4, nvfp4 and mxfp8, which the config names: `weight` in words, `scales` in bytes."""
    layer = tensor.name.removesuffix(".weight")
    scale, mode = by_name.get(f"{layer}.scales"), mlx_says(config, layer).get("mode")
    if layer == tensor.name or scale is None or mode not in ("mxfp4", "nvfp4", "mxfp8"):
        return None
    if (tensor.dtype, scale.dtype) != ("U32", "U8") or len(tensor.shape) != 2 or len(scale.shape) != 2:
        return None
    size, bits = _NV if mode == "nvfp4" else _MX, 8 if mode == "mxfp8" else 4
    rows, inputs = scale.shape[0], size * scale.shape[1]
    if tensor.shape != (rows, inputs * bits // 32) or f"{layer}.biases" in by_name:
        return None

    def read(index: int | None) -> Tensor:
        packed, factors = tensor.read(None).view(torch.uint8), scale.read(None)
        factors = _values(factors.view(torch.float8_e4m3fn) if mode == "nvfp4" else factors)
        values = packed.view(torch.float8_e4m3fn).float() if bits == 8 else _fp4(packed)
        return (values.unflatten(1, (-1, size)) * factors[..., None]).flatten(1).to(torch.bfloat16)

    return Unpacked(Stored(tensor.name, (rows, inputs), mode.upper(), True, read), (scale.name,))


def _fp4(packed: Tensor) -> Tensor:
    """Return the values (..., 2 n) of bytes (..., n) that hold two of them each, the low half first."""
    table = torch.tensor(_FP4)
    return torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], -1).flatten(-2)


def _values(scales: Tensor) -> Tensor:
    """Return scales as numbers that products are made of: in float32 where they are stored in 8 bits."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    return scales.float() if scales.element_size() == 1 else scales

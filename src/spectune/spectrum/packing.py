"""Packed tensors of published checkpoints, each with its scales, as tensors of values: one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectune.spectrum.integers import awq, compressed, gptq, mlx
from spectune.spectrum.stored import Stored

_FP8 = ("F8_E4M3", "F8_E5M2")
_BLOCK = 128  # rows and columns that share a scale, the last ones of which may be fewer
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantized(stored: Sequence[Stored], config: Mapping[str, Any] | None = None) -> list[Stored]:
    """Return the tensors of a checkpoint with those that are packed, and whose packing is known, as their values.

    Known are 8-bit floats with a scale for each block (`weight_scale_inv`), 8-bit floats and integers with one for each
    row or for all (`weight_scale`), MXFP4 (`_blocks` and `_scales`), and what `spectune.spectrum.integers` knows.
    Scales are no tensors of their own then.

    Args:
        stored: every tensor of the checkpoint.
        config: its config.json.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    found: dict[str, Stored] = {}
    scales: set[str] = set()
    for tensor in stored:
        for way in (_in_blocks, _by_row, _mxfp4):
            made = way(tensor, by_name)
            if made is not None:
                found[tensor.name], used = made
                scales.add(used)
                break
        for unpack in (gptq, awq, compressed, mlx):
            unpacked = unpack(tensor, by_name, config or {})
            if unpacked is not None:
                found[tensor.name] = unpacked.stored
                scales.update(unpacked.used)
                break
    return [found.get(tensor.name, tensor) for tensor in stored if tensor.name not in scales]


Made = tuple[Stored, str] | None  # the values, and the name of their scales


def _in_blocks(tensor: Stored, by_name: dict[str, Stored]) -> Made:
    scale = by_name.get(f"{tensor.name}_scale_inv")
    if tensor.dtype not in _FP8 or scale is None or len(tensor.shape) != 2 or len(scale.shape) != 2:
        return None
    found = [_block(size, count) for size, count in zip(tensor.shape, scale.shape, strict=True)]
    sides = [side for side in found if side is not None]
    if len(sides) < 2 or not scale.floating:
        return None

    def read(index: int | None) -> Tensor:
        weight, factors = tensor.read(None).float(), scale.read(None)
        for dim, side in enumerate(sides):
            factors = factors.repeat_interleave(side, dim).narrow(dim, 0, weight.shape[dim])
        return weight.mul_(factors.float()).to(factors.dtype)

    return tensor._replace(floating=True, read=read), scale.name


def _block(size: int, count: int) -> int | None:
    if -(-size // _BLOCK) == count:
        return _BLOCK
    return size // count if count and size % count == 0 else None


def _by_row(tensor: Stored, by_name: dict[str, Stored]) -> Made:
    scale = by_name.get(f"{tensor.name}_scale")
    if tensor.dtype not in (*_FP8, "I8") or scale is None or not scale.floating or len(tensor.shape) != 2:
        return None
    if scale.shape not in ((), (1,), (1, 1), (tensor.shape[0], 1)) or f"{tensor.name}_zero_point" in by_name:
        return None

    def read(index: int | None) -> Tensor:
        factors = scale.read(None)
        return tensor.read(None).to(factors.dtype) * factors

    return tensor._replace(floating=True, read=read), scale.name


def _mxfp4(tensor: Stored, by_name: dict[str, Stored]) -> Made:
    name = tensor.name.removesuffix("_blocks")
    scale = by_name.get(f"{name}_scales")
    if name == tensor.name or scale is None or (tensor.dtype, scale.dtype) != ("U8", "U8"):
        return None
    if len(tensor.shape) != 4 or tensor.shape[:3] != scale.shape:
        return None
    experts, rows, groups, width = tensor.shape
    read: Callable[[int | None], Tensor] = partial(_read_mxfp4, tensor, scale)
    return Stored(name, (experts, 2 * width * groups, rows), "MXFP4", True, read), scale.name


def _read_mxfp4(tensor: Stored, scale: Stored, index: int | None) -> Tensor:
    """Return values (in x out) as transformers holds them: two in a byte, the low half first, times 2^(scale - 127)."""
    blocks, exponents = tensor.read(index), scale.read(index).int() - 127
    table = torch.tensor(_FP4, dtype=torch.bfloat16)
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], -1).flatten(-2)
    return torch.ldexp(values, exponents[..., None]).to(torch.bfloat16).flatten(-2).mT.contiguous()

"""Weights in 2 to 8 bits that lie several in a word, as GPTQ, AWQ, compressed-tensors and MLX store them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.spectrum.stored import Stored, Unpacked

_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight values lies
_MODES = (None, "affine")  # of MLX: whole numbers with a scale and a bias for each group


def unpacked(words: Tensor, bits: int, count: int, dim: int, *, spill: bool = True) -> Tensor:
    """Return the whole numbers (uint8) that lie in 32-bit words along an axis, the lowest bits first.

    Args:
        words: int32 or uint32, of two dimensions.
        bits: of each number.
        count: how many there are along the axis; the last words may hold fewer.
        dim: the axis.
        spill: a number may begin in one word and end in the next; else what is left over in a word is empty.
    """
    words = words.view(torch.int32).transpose(0, dim)
    period = _WORD // math.gcd(_WORD, bits) if spill else _WORD // bits  # numbers, after which words are full
    taken = period * bits // _WORD if spill else 1
    rows = -(-count // period)
    if len(words) < rows * taken:
        words = torch.cat([words, words.new_zeros(rows * taken - len(words), words.shape[1])])
    out = torch.empty(rows * period, words.shape[1], dtype=torch.uint8)
    for k in range(period):
        word, shift = divmod(k * bits, _WORD) if spill else (0, k * bits)
        value = (words[word::taken][:rows] >> shift) & ((1 << min(bits, _WORD - shift)) - 1)
        if shift + bits > _WORD:
            rest = words[word + 1 :: taken][:rows] & ((1 << (shift + bits - _WORD)) - 1)
            value = value | (rest << (_WORD - shift))
        out[k::period] = value.to(torch.uint8)
    return out[:count].transpose(0, dim)


def gptq(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """GPTQ: qweight (in * bits / 32 x out), a scale and a zero for each group of inputs, in the order of g_idx."""
    layer = tensor.name.removesuffix(".qweight")
    scales, zeros, order = (by_name.get(f"{layer}.{key}") for key in ("scales", "qzeros", "g_idx"))
    if layer == tensor.name or not _are(scales, zeros, 2) or len(tensor.shape) != 2 or tensor.dtype != "I32":
        return None
    (groups, out), (rows, packed) = scales.shape, zeros.shape  # type: ignore[union-attr]
    if tensor.shape[1] != out or rows != groups or packed * _WORD % out:
        return None
    bits = packed * _WORD // out
    inputs = tensor.shape[0] * _WORD // bits if 2 <= bits <= 8 else 0
    if not inputs or tensor.shape[0] * _WORD % bits or (order is None and inputs % groups):
        return None
    if order is not None and order.shape != (inputs,):
        return None
    method = _of(config, "quantization_config")
    # the first format stores each zero less one
    more = 0 if method.get("checkpoint_format") == "gptq_v2" else 1

    def read(index: int | None) -> Tensor:
        s: Tensor = scales.read(None)  # type: ignore[union-attr]
        z = unpacked(zeros.read(None), bits, out, 1).short() + more  # type: ignore[union-attr]
        of = _groups(order, inputs, groups)
        q = unpacked(tensor.read(None), bits, inputs, 0).short()
        return (s[of] * (q - z[of]).to(s.dtype)).mT.contiguous()

    used = [f"{layer}.{key}" for key in ("scales", "qzeros", "g_idx") if f"{layer}.{key}" in by_name]
    return Unpacked(Stored(f"{layer}.weight", (out, inputs), f"GPTQ{bits}", True, read), tuple(used))


def awq(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """AWQ: qweight (in x out / 8) in 4 bits, with a scale and a zero for each group of inputs."""
    layer = tensor.name.removesuffix(".qweight")
    scales, zeros = (by_name.get(f"{layer}.{key}") for key in ("scales", "qzeros"))
    if layer == tensor.name or not _are(scales, zeros, 2) or len(tensor.shape) != 2 or tensor.dtype != "I32":
        return None
    (groups, out), inputs = scales.shape, tensor.shape[0]  # type: ignore[union-attr]
    if tensor.shape[1] * 8 != out or zeros.shape != (groups, out // 8) or inputs % groups:  # type: ignore[union-attr]
        return None

    def numbers(words: Tensor) -> Tensor:
        found = unpacked(words, 4, out, 1)
        return found.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1).short()

    def read(index: int | None) -> Tensor:
        s: Tensor = scales.read(None)  # type: ignore[union-attr]
        z = numbers(zeros.read(None))  # type: ignore[union-attr]
        q = numbers(tensor.read(None)).unflatten(0, (groups, -1))
        return ((q - z[:, None]).to(s.dtype) * s[:, None]).flatten(0, 1).mT.contiguous()

    return Unpacked(
        Stored(f"{layer}.weight", (out, inputs), "AWQ4", True, read), (f"{layer}.scales", f"{layer}.qzeros")
    )


def compressed(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """compressed-tensors' "pack-quantized": weight_packed (out x in / n), n numbers with an offset in each word."""
    name = tensor.name.removesuffix("_packed")
    scale, zero, order = (by_name.get(f"{name}_{key}") for key in ("scale", "zero_point", "g_idx"))
    if name == tensor.name or scale is None or not scale.floating or tensor.dtype != "I32" or len(tensor.shape) != 2:
        return None
    shape = by_name.get(f"{name}_shape")
    if shape is None or shape.shape != (2,) or len(scale.shape) != 2 or 0 in (*scale.shape, *tensor.shape):
        return None
    out, inputs = map(int, shape.read(None))
    groups = scale.shape[1]
    bits = next((b for b in (4, 8, 2, 3, 5, 6, 7) if -(-inputs // (_WORD // b)) == tensor.shape[1]), 0)
    said = _bits_said(config)
    bits = said if said and -(-inputs // (_WORD // said)) == tensor.shape[1] else bits
    if not bits or (tensor.shape[0], scale.shape[0]) != (out, out) or (order is None and inputs % groups):
        return None
    if order is not None and order.shape != (inputs,):
        return None
    packed = zero is not None and zero.dtype == "I32"
    if zero is not None and zero.shape != (-(-out // (_WORD // bits)) if packed else out, groups):
        return None
    offset = 1 << (bits - 1)

    def read(index: int | None) -> Tensor:
        s = scale.read(None)
        of = _groups(order, inputs, groups)
        q = (unpacked(tensor.read(None), bits, inputs, 1, spill=False).short() - offset).to(s.dtype)
        if zero is not None:
            z = zero.read(None)
            z = unpacked(z, bits, out, 0, spill=False).short() - offset if packed else z
            q = q - z.to(s.dtype)[:, of]
        return q * s[:, of]

    used = [f"{name}_{key}" for key in ("scale", "zero_point", "g_idx", "shape") if f"{name}_{key}" in by_name]
    return Unpacked(Stored(name, (out, inputs), f"INT{bits}", True, read), tuple(used))


def mlx(tensor: Stored, by_name: Mapping[str, Stored], config: Mapping[str, object]) -> Unpacked | None:
    """MLX: weight (out x in * bits / 32), with a scale and a bias for each group, of a size that the config says."""
    layer = tensor.name.removesuffix(".weight")
    scales, biases = (by_name.get(f"{layer}.{key}") for key in ("scales", "biases"))
    if layer == tensor.name or tensor.dtype != "U32" or not _are(scales, biases, 2, floating=True):
        return None
    said = mlx_says(config, layer)
    bits, size = said.get("bits"), said.get("group_size")
    if not (type(bits) is int and 2 <= bits <= 8 and type(size) is int and size > 0) or said.get("mode") not in _MODES:
        return None
    (out, groups), shape = scales.shape, biases.shape  # type: ignore[union-attr]
    inputs = groups * size
    if shape != (out, groups) or tensor.shape != (out, inputs * bits // _WORD):
        return None

    def read(index: int | None) -> Tensor:
        s, b = scales.read(None), biases.read(None)  # type: ignore[union-attr]
        q = unpacked(tensor.read(None), bits, inputs, 1).to(s.dtype).unflatten(1, (groups, size))
        return (q * s[..., None] + b[..., None]).flatten(1)

    return Unpacked(
        Stored(tensor.name, (out, inputs), f"MLX{bits}", True, read), (f"{layer}.scales", f"{layer}.biases")
    )


def mlx_says(config: Mapping[str, object], layer: str) -> dict[str, object]:
    """Return what an MLX checkpoint's config says of a layer's packing."""
    said = _of(config, "quantization") or _of(config, "quantization_config")
    own = said.get(layer)
    return {**said, **own} if isinstance(own, dict) else said


def _groups(order: Stored | None, inputs: int, groups: int) -> Tensor:
    """Return the group (inputs) of each input: one after another, or as an order says.

    Raises:
        SpectuneError: it names a group that there is not.
    """
    if order is None:
        return torch.arange(inputs) // (inputs // groups)
    of = order.read(None).long()
    if of.min() < 0 or of.max() >= groups:
        raise SpectuneError(f"{order.name!r} names groups that are not there")
    return of


def _are(scales: Stored | None, others: Stored | None, axes: int, *, floating: bool = False) -> bool:
    """Whether scales, and what lies beside them, are there, with so many axes and of their kinds."""
    if scales is None or others is None or not scales.floating or len(scales.shape) != axes or 0 in scales.shape:
        return False
    return len(others.shape) == axes and (others.floating if floating else others.dtype == "I32")


def _of(config: Mapping[str, object], key: str) -> dict[str, object]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _bits_said(config: Mapping[str, object]) -> int | None:
    """Return the bits that all groups of layers have in compressed-tensors' configuration, or None."""
    groups = _of(_of(config, "quantization_config"), "config_groups").values()
    said = {_of(group, "weights").get("num_bits") for group in groups if isinstance(group, dict)}
    bits = said.pop() if len(said) == 1 else None
    return bits if type(bits) is int and 2 <= bits <= 8 else None

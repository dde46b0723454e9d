"""Packed tensors of published checkpoints, each with its scales, as tensors of values: one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spectune.spectrum.floats import by_row, fp4, fp8_blocks, mlx_floats, modelopt, mxfp4_experts
from spectune.spectrum.integers import awq, compressed, gptq, mlx
from spectune.spectrum.stored import Stored

_WAYS = (fp8_blocks, by_row, mxfp4_experts, fp4, modelopt, gptq, awq, compressed, mlx, mlx_floats)


def dequantized(stored: Sequence[Stored], config: Mapping[str, object] | None = None) -> list[Stored]:
    """Return the tensors of a checkpoint with those that are packed, and whose packing is known, as their values.

    Known is what `spectune.spectrum.floats` and `spectune.spectrum.integers` know. Scales are no tensors of their own
    then.

    Args:
        stored: every tensor of the checkpoint.
        config: its config.json.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    found: dict[str, Stored] = {}
    scales: set[str] = set()
    for tensor in stored:
        unpacked = next((made for way in _WAYS if (made := way(tensor, by_name, config or {})) is not None), None)
        if unpacked is not None:
            found[tensor.name] = unpacked.stored
            scales.update(unpacked.used)
    return [found.get(tensor.name, tensor) for tensor in stored if tensor.name not in scales]

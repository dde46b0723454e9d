"""What a fine-tune holds in memory on each of several devices, and how much of a batch fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from spectune.layers.modules import find_linear, stored_weight
from spectune.methods.lora import LoRA
from spectune.model.targets import resolve

Precision = Literal["fp32", "bf16", "4bit"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "4bit": torch.bfloat16}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, and doubly quantized scales of blocks of 64


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's weights in one precision.

    Args:
        total: of all parameters and buffers.
        packed: how many of them are packed in 4 bits.
        working: a dequantized copy of the largest linear layer, in 4 bits; else 0.
        block: what FSDP2 gathers at once: the largest block, and the next.
    """

    total: float
    packed: int
    working: float
    block: float


def weights_of(model: nn.Module, precision: Precision) -> Weights:
    """Return the bytes of a model's weights; in 4 bits every linear layer but the output embedding is packed."""
    size = DTYPES[precision].itemsize
    packed: set[int] = set()
    if precision == "4bit":
        packed = {id(stored_weight(find_linear(model, name))) for name in resolve(model, LoRA(rank=1))}

    def held(parameters: Iterable[Tensor]) -> float:
        unique = {id(p): p for p in parameters}.values()
        return sum(p.numel() * (NF4 if id(p) in packed else size) for p in unique)

    buffers = sum(_bytes(b) for b in model.buffers())
    count = sum(p.numel() for p in model.parameters() if id(p) in packed)
    largest = max((p.numel() for p in model.parameters() if id(p) in packed), default=0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    block = max((held(b.parameters()) for stack in stacks for b in stack), default=0.0)
    return Weights(held(model.parameters()) + buffers, count, largest * size, 2 * block)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.  Gradients come as activations go, so `total` counts what both take together at most.

    Args:
        weights: of the base, and what works on them: dequantized or gathered copies.
        bases: the method's frozen tensors.
        trained: the adapter, in float32.
        optimizer: AdamW's two moments, and a method's own scores.
        gradients: of what trains.
        activations: held at most during forward and backward.
        step: activations and gradients together, at most.
        total: of weights, bases, trained, optimizer and step.
    """

    weights: int
    bases: int
    trained: int
    optimizer: int
    gradients: int
    activations: int | None
    step: int
    total: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Parts:
    """The bytes of a fine-tune before they are spread: weights, and what the method adds.

    Args:
        weights: of the base.
        bases, trained, optimizer, gradients: as in `Memory`, over all devices.
        activations: of one row of the batch, and of each further one; None where the model cannot be traced.
        step: the same for activations and gradients together, on one device.
    """

    weights: Weights
    bases: float
    trained: float
    optimizer: float
    gradients: float
    activations: tuple[float, float] | None
    step: tuple[float, float] = (0.0, 0.0)

    def on(self, devices: int, rows: int) -> Memory:
        """Return what each device holds; FSDP2 shards all but activations and what is gathered to be used."""
        used = self.weights.working + (self.weights.block if devices > 1 else 0)
        weights = self.weights.total / devices + used
        bases, trained, optimizer, gradients = (
            round(x / devices) for x in (self.bases, self.trained, self.optimizer, self.gradients)
        )
        held = None if self.activations is None else round(self.activations[0] + (rows - 1) * self.activations[1])
        both = round(self.step[0] + (rows - 1) * self.step[1] - self.gradients + gradients)
        step = max(held or 0, gradients, both)
        total = round(weights) + bases + trained + optimizer + step
        return Memory(round(weights), bases, trained, optimizer, gradients, held, step, total)

    def largest_batch(self, devices: int, memory: int) -> int | None:
        """Return the rows that fit each device's memory; None where activations are not known."""
        if self.activations is None:
            return None
        low, high = 0, 1
        while high < 1 << 40 and self.on(devices, high).total <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.on(devices, middle).total <= memory else (low, middle)
        return low

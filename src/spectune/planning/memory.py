"""What a fine-tune holds in memory on each of several devices, and how much of a batch fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from spectune.bases.quantizing import parsed
from spectune.errors import SpectuneError
from spectune.layers.modules import find_linear, stored_weight
from spectune.layers.parts import PartLinear
from spectune.methods.lora import LoRA
from spectune.model.targets import resolve

PRECISIONS = ("fp32", "bf16", "4bit", "8bit")
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, and doubly quantized scales of blocks of 64
_ROW = 4  # bytes beside a row of 8-bit weights: its scale


class Precision(NamedTuple):
    """What a base is held in.

    Args:
        kind: of `PRECISIONS`.
        dtype: of what is not packed, and of what is computed.
        rank: of the part of each packed weight that is held beside it.
    """

    kind: str
    dtype: torch.dtype
    rank: int = 0

    @property
    def packs(self) -> bool:
        """Whether linear layers are packed."""
        return self.kind in ("4bit", "8bit")

    def bytes_of(self, weight: Tensor) -> float:
        """Return what a packed weight takes, with what is beside it."""
        rows, columns = weight.shape
        beside = min(self.rank, rows, columns) * (rows + columns) * self.dtype.itemsize
        return beside + (weight.numel() * NF4 if self.kind == "4bit" else weight.numel() + _ROW * rows)


def precision_of(text: str) -> Precision:
    """Return what "fp32", "bf16", "8bit", "4bit" or "4bit:rank=16" says.

    Raises:
        SpectuneError: it is none of these.
    """
    kind, _, rest = str(text).partition(":rank=")
    if kind not in PRECISIONS or (rest and not (kind == "4bit" and rest.isdecimal())) or str(text).endswith("="):
        raise SpectuneError(f"unknown precision {text!r} (known: {', '.join(PRECISIONS)}, 4bit:rank=16)")
    return Precision(kind, torch.float32 if kind == "fp32" else torch.bfloat16, int(rest or 0))


def precision_of_run(quantize: str | None, dtype: str | None) -> str | None:
    """Return the precision of a base that `quantize` and `dtype` say, as a plan names it; None of another dtype."""
    if quantize is None:
        return dtype if dtype in ("fp32", "bf16") else None
    how = parsed(quantize)
    return "8bit" if how.kind == "int8" else f"4bit:rank={how.rank}" if how.rank else "4bit"


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's weights in one precision.

    Args:
        total: of all parameters and buffers.
        packed: how many of them are packed.
        working: a dequantized copy of the largest packed layer; 0 where none is packed.
        block: what FSDP2 gathers at once: the largest block, and the next.
    """

    total: float
    packed: int
    working: float
    block: float


def weights_of(model: nn.Module, precision: str) -> Weights:
    """Return the bytes of a model's weights; every linear layer but the output embedding is packed, if any.

    Experts whose weights lie in one tensor are no linear layers to bitsandbytes, and stay as they are.
    """
    how = precision_of(precision)
    size = how.dtype.itemsize
    packed: set[int] = set()
    if how.packs:
        layers = [find_linear(model, name) for name in resolve(model, LoRA(rank=1))]
        packed = {id(stored_weight(layer)) for layer in layers if not isinstance(layer, PartLinear)}

    def held(parameters: Iterable[Tensor]) -> float:
        unique = {id(p): p for p in parameters}.values()
        return sum(how.bytes_of(p) if id(p) in packed else p.numel() * size for p in unique)

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

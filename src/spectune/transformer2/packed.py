"""An adapter in memory in little more than its trained values: one tensor, and a structure that many adapters share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.methods import Method


class Piece(NamedTuple):
    """One trained tensor: where it is and what it belongs to.

    Args:
        layer: the layer's name.
        term: which of the layer's terms.
        key: the tensor's name in the method.
        shape: its shape.
        method, weight: of the term.
    """

    layer: str
    term: int
    key: str
    shape: tuple[int, ...]
    method: Method
    weight: float


Structure = tuple[Piece, ...]


class Packed(NamedTuple):
    """An adapter's trained values, float32 on the CPU, end to end as its structure says."""

    structure: Structure
    values: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return self.values.numel() * self.values.element_size()

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Return the trained tensors in the structure's order, as views of one tensor on a device."""
        flat = self.values.to(device)
        sizes = [int(torch.Size(piece.shape).numel()) for piece in self.structure]
        return [part.view(piece.shape) for part, piece in zip(flat.split(sizes), self.structure, strict=True)]


def structure_of(adapter: Adapter) -> Structure:
    """Return what two adapters must share for the values of one to fit in the place of the other's.

    Raises:
        SpectuneError: the adapter brings modules whole, which take the memory that places are there to save.
    """
    if adapter.modules:
        raise SpectuneError(
            f"a library's adapters change linear layers only, and this one brings {next(iter(adapter.modules))!r} "
            "whole: put it on the model by itself (-a, spectune.attach)"
        )
    return tuple(
        Piece(name, i, key, tuple(tensor.shape), term.method, term.weight)
        for name, layer in adapter.layers.items()
        for i, term in enumerate(layer.terms)
        for key, tensor in term.trained.items()
    )


def pack(adapter: Adapter, structure: Structure) -> Packed:
    """Return an adapter's values in the order of its structure."""
    parts = [adapter.layers[p.layer].terms[p.term].trained[p.key].float().flatten() for p in structure]
    return Packed(structure, torch.cat(parts))

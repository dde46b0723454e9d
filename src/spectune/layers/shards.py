"""Tensors that FSDP2 keeps in parts, one a process: as wholes, and back as parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_part(tensor: Any) -> bool:
    """Whether a process holds a part of this tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor, detached; every process must ask for it."""
    return tensor.detach().full_tensor() if is_part(tensor) else tensor.detach()


def as_part(tensor: Tensor, of: Any) -> Tensor:
    """Return a whole tensor, the same in every process, in parts as `of` is."""
    if not is_part(of):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(of.device), of.device_mesh, of.placements, src_data_rank=None)

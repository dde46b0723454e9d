"""Tensors that FSDP2 keeps in parts, one a process: as wholes, and back as parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_part(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a process holds a part of this tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, detached; every process must ask for it."""
    own = tensor.detach()
    return own.full_tensor() if is_part(own) else own


def as_part(tensor: Tensor, of: Tensor) -> Tensor:
    """Return a whole tensor, the same in every process, in parts as `of` is."""
    if not is_part(of):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # a second, which nobody without shards need wait for

    return distribute_tensor(tensor.to(of.device), of.device_mesh, of.placements, src_data_rank=None)

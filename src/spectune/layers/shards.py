"""Tensors that FSDP2 keeps in parts, one a process: as wholes, and back as parts; and those that ZeRO-3 does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from spectune.errors import SpectuneError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_part(tensor: object) -> TypeGuard[DTensor]:
    """Whether a process holds a part of this tensor only."""
    return hasattr(tensor, "full_tensor") or _is_empty(tensor)


def _is_empty(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has the values of a parameter elsewhere, as it has outside of forward passes."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, detached; every process must ask for it.

    Raises:
        SpectuneError: ZeRO-3 holds it.
    """
    if _is_empty(tensor):
        raise SpectuneError(
            "DeepSpeed's ZeRO-3 holds the model's tensors in parts: do this within "
            "deepspeed.zero.GatheredParameters(list(model.parameters())), in every process"
        )
    own = tensor.detach()
    return own.full_tensor() if is_part(own) else own


def as_part(tensor: Tensor, of: Tensor) -> Tensor:
    """Return a whole tensor, the same in every process, in parts as `of` is."""
    if not is_part(of):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # a second, which nobody without shards need wait for

    return distribute_tensor(tensor.to(of.device), of.device_mesh, of.placements, src_data_rank=None)

"""How much memory a device has free."""

from __future__ import annotations

import psutil
import torch

_LEFT = 8  # the part of all memory that is left to others


def room(device: torch.device) -> int:
    """Return the bytes that a device has free."""
    return _free_of(device)[0]


def has_room(device: torch.device, size: int) -> bool:
    """Whether a device has room for so many bytes that may be done without, and then for others too."""
    free, total = _free_of(device)
    return size <= free - total // _LEFT


def _free_of(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # what PyTorch holds for the next tensor is free too
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    memory = psutil.virtual_memory()
    return memory.available, memory.total

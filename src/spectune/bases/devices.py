"""Where and in which dtype models compute."""

from __future__ import annotations

import torch

from spectune.errors import SpectuneError, nearest
from spectune.private import multiplies_bfloat16

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def resolve_dtype(dtype: str | torch.dtype | None, device: str | torch.device = "cpu") -> torch.dtype:
    """Return a torch dtype; None and "auto" take bf16 where the device multiplies it fast, else fp32.

    Raises:
        SpectuneError: an unknown dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    if dtype not in _DTYPES:
        raise SpectuneError(f"unknown dtype {dtype!r}{nearest(dtype, _DTYPES)} (known: fp32, bf16, fp16, auto)")
    return _DTYPES[dtype]


def fast_bf16(device: str | torch.device = "cpu") -> bool:
    """Whether bf16 products are faster than fp32 here; on a CPU, whether it has instructions for them.

    A measurement would be another on a busy machine, and a run be resumed in another dtype.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported()
    return multiplies_bfloat16()


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def checked_device(device: str | torch.device | None) -> torch.device:
    """Return a device that is there; None takes the accelerator if there is one.

    Raises:
        SpectuneError: no such device, or none that this PyTorch can use.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        if found.type != "cuda" or not torch.cuda.is_available():
            torch.empty(0, device=found)
        elif (found.index or 0) >= torch.cuda.device_count():  # to allocate would open each card in each process
            raise RuntimeError(f"there are {torch.cuda.device_count()}")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        own = default_device().type
        there = "cpu" if own == "cpu" else f"{own} or cpu"
        reason = str(error).strip().splitlines()[0][:120]
        raise SpectuneError(f"device={device} cannot be used here ({reason}); give {there}") from None
    return found

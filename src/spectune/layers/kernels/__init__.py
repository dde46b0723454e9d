"""Triton kernels in the place of PyTorch code that says what they compute.

They answer for float32, bfloat16 and float16 on a GPU where Triton works: on its first use of a device each module
compares its kernels with PyTorch on a small case, and leaves the device to PyTorch if one fails.
`SPECTUNE_KERNELS=off` leaves everything to PyTorch; `TRITON_INTERPRET=1` runs them on the CPU, slowly, which is how
they are tested.  They were never run on a GPU, so what they gain is not measured: `make gpu` does that.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from spectune.speed.shapes import switched_off

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are defined
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 1024  # sums over rows are split until there are about so many programs


def kernels(name: str, *tensors: Tensor) -> ModuleType | None:
    """Return the module `name` of this package if its kernels answer for these tensors, else None.

    Args:
        name: `low_rank` or `banded`.
        tensors: all operands, on one device.
    """
    device = tensors[0].device
    if not (device.type == "cuda" or INTERPRETED) or switched_off():
        return None
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype in _DTYPES and t.device == device for t in tensors)
    return _working(name, device) if plain and not torch.compiler.is_compiling() else None


@cache
def _working(name: str, device: torch.device) -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except Exception:  # whatever a broken installation raises
        return None
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        module = import_module(f"{__name__}.{name}")
        with torch.no_grad():
            reason = None if module.agrees(device) else "they disagree with PyTorch"
    except Exception as error:  # no compiler, an unknown device, ...
        module, reason = None, f"{type(error).__name__}: {error}"
    if reason is None:
        return module
    warnings.warn(f"Triton's {name} kernels are not used on {device}, PyTorch is: {reason}", stacklevel=2)
    return None


def blocks(n: int, size: int) -> int:
    """Return how many blocks of a size hold n."""
    return -(-n // size)


def parts(n: int, rows: int, programs: int) -> tuple[int, int]:
    """Return in how many parts to sum n rows, each of some four tiles or more, and the rows of a part.

    Args:
        n: rows.
        rows: of a tile.
        programs: that work on each part.
    """
    most = max(1, min(n // (4 * rows), _PROGRAMS // max(1, programs)))
    share = blocks(n, most * rows) * rows
    return max(1, blocks(n, max(1, share))), share

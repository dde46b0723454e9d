"""Whether a comparison fits into memory, before anything is loaded."""

from __future__ import annotations

import torch

from spectune.bases.devices import default_device, resolve_dtype
from spectune.bases.shapes import build, find_config
from spectune.compare.candidates import FULL
from spectune.compare.config import CompareConfig
from spectune.errors import SpectuneError
from spectune.pages.units import gigabytes
from spectune.planning.memory import precision_of_run, weights_of
from spectune.speed.room import room

_FULL = 16  # bytes a weight: float32, its gradient, and AdamW's two moments


def check_room(config: CompareConfig, free: int | None = None) -> list[str]:
    """Raise where not even the base fits; return the methods that do not.

    Args:
        config: the comparison; what its config cannot be had of without loading is taken to fit.
        free: bytes; what the device has now if not given.

    Raises:
        SpectuneError: the weights do not fit; the need, and what would, are named.
    """
    device = torch.device(config.device) if config.device else default_device()
    try:
        built = build(find_config(config.model, trust_remote_code=config.trust_remote_code))
    except SpectuneError:
        return []
    dtype = resolve_dtype(config.dtype, device)
    precision = precision_of_run(config.quantize, "fp32" if dtype == torch.float32 else "bf16")
    weights = weights_of(built, precision or "bf16").total
    if free is None:
        free = room(device)
    if weights * config.workers > free:
        fewer = f"workers={max(1, int(free // weights))}, " if config.workers > 1 and weights <= free else ""
        half = "dtype=bf16, " if dtype == torch.float32 else ""
        raise SpectuneError(
            f"{config.workers} times the weights of {config.model} take {gigabytes(weights * config.workers)}, and "
            f"{gigabytes(free)} are free: give {half}{fewer}a smaller model or a larger machine (`spectune plan "
            f"{config.model}` says what each method takes)"
        )
    count = sum(p.numel() for p in built.parameters())
    too_large = FULL in config.methods and config.workers * (weights + _FULL * count) > free
    return [FULL] if too_large else []

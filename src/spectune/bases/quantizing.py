"""Bases in 4 or 8 bits: what transformers is told so that bitsandbytes packs a model's linear layers."""

from __future__ import annotations

import logging
from typing import Any

import torch

from spectune.errors import SpectuneError, nearest, need

QUANTIZATIONS = ("nf4", "int8")


def check_quantization(quantize: str | None) -> None:
    """Raise where a quantization is not known, or its library is missing.

    Raises:
        SpectuneError: so it is.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise SpectuneError(f"quantize must be one of {known}, not {quantize!r}{nearest(str(quantize), QUANTIZATIONS)}")
    need("bitsandbytes", f"quantize={quantize}", "spectune[quantized]")


def quantization(quantize: str | None, dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Return what `from_pretrained` is given beside the rest.

    Args:
        quantize: "nf4", "int8", or None for nothing.
        dtype: to compute in.
        device: where to; None is the CPU.

    Raises:
        SpectuneError: as `check_quantization`.
    """
    check_quantization(quantize)
    if quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    _hush()
    if quantize == "nf4":
        options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    else:
        options = {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": device or torch.device("cpu")}}


_COMMON = ("inputs will be cast from", "Failed to load CPU gemm_4bit_forward")


def _hush() -> None:
    """Leave out what bitsandbytes says in every layer of every pass."""
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logger = logging.getLogger(name)
        if _told not in logger.filters:
            logger.addFilter(_told)


def _told(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _COMMON)

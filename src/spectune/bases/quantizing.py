"""Bases in 4 or 8 bits: what transformers is told so that bitsandbytes packs a model's linear layers."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers import BitsAndBytesConfig

from spectune.errors import SpectuneError, nearest, need
from spectune.layers.modules import find_module, linear_layers
from spectune.layers.packed import put_beside
from spectune.model.fresh import mark_loaded
from spectune.model.targets import output_embeddings
from spectune.model.wanted import fresh_heads
from spectune.spectral import svd

QUANTIZATIONS = ("nf4", "int8")
_REFINE = 5  # rounds, after which the error of 4 bits hardly falls


class Quantization(NamedTuple):
    """How a base is packed.

    Args:
        kind: "nf4" or "int8".
        rank: of the part of each W that is held beside what is packed; 0 packs all of it.
        refine: how often that part is made anew of what packing lost, and the rest packed again.
    """

    kind: str
    rank: int = 0
    refine: int = _REFINE


def parsed(text: str) -> Quantization:
    """Return what a text such as "nf4" or "nf4:rank=16,refine=5" says.

    Raises:
        SpectuneError: it is none.
    """
    kind, _, rest = str(text).partition(":")
    if kind not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise SpectuneError(f"quantize must be one of {known}, not {text!r}{nearest(kind, QUANTIZATIONS)}")
    values: dict[str, int] = {}
    for part in rest.split(",") if rest else ():
        key, _, value = part.partition("=")
        if key not in ("rank", "refine") or not value.isdecimal() or key in values:
            raise SpectuneError(f"quantize {text!r} is not understood at {part!r}: write nf4:rank=16,refine=5")
        values[key] = int(value)
    if values and (kind != "nf4" or not values.get("rank")):
        raise SpectuneError(f"quantize {text!r}: a rank beside what is packed, and refine with it, are for nf4")
    return Quantization(kind, **values)


def check_quantization(quantize: str | None) -> None:
    """Raise where a quantization is not known, or its library is missing.

    Raises:
        SpectuneError: so it is.
    """
    if quantize is None:
        return
    parsed(quantize)
    need("bitsandbytes", f"quantize={quantize}", "spectune[quantized]")


def quantization(quantize: str | None, dtype: torch.dtype, device: torch.device | None) -> dict[str, object]:
    """Return what `from_pretrained` is given beside the rest; nothing where `pack_the_rest` is to follow.

    Args:
        quantize: as `parsed` takes it, or None for nothing.
        dtype: to compute in.
        device: where to; None is the CPU.

    Raises:
        SpectuneError: as `check_quantization`.
    """
    check_quantization(quantize)
    if quantize is None:
        return {}
    _hush()
    how = parsed(quantize)
    if how.rank:
        return {}
    if how.kind == "nf4":
        options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    else:
        options = {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": device or torch.device("cpu")}}


@torch.no_grad()
def pack_the_rest(model: nn.Module, quantize: str | None, dtype: torch.dtype, device: torch.device | None) -> None:
    """Pack every linear layer but the output embedding and heads, with a low-rank part of each W beside it.

    L R begins as the largest singular triplets of W (QPiSSA, arXiv 2404.02948); then W - L R is packed as Q, L R made
    anew of W - Q, and so on (LoftQ, arXiv 2310.08659).  What came nearest to W is taken.

    Args:
        model: with its weights as they are.
        quantize: as `parsed` takes it; without a rank nothing is done.
        dtype: to compute in, and that L and R are held in.
        device: where to; None is the CPU.
    """
    if quantize is None or not (how := parsed(quantize)).rank:
        return
    import bitsandbytes as bnb

    aside = output_embeddings(model) | {find_module(model, name) for name in fresh_heads(model)}
    held: list[Tensor] = []
    for name, layer in linear_layers(model).items():
        if type(layer) is not nn.Linear or layer in aside:
            continue
        weight = layer.weight.to(device or "cpu")
        packed, left, right = _nearest(weight, how, dtype)
        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        made.weight, made.bias = packed, layer.bias
        packed.module = made
        put_beside(made, left, right)
        held += made.parameters()
        around, _, key = name.rpartition(".")
        setattr(find_module(model, around) if around else model, key, made.train(layer.training).requires_grad_(False))
    mark_loaded(model, held)


def _nearest(weight: Tensor, how: Quantization, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """Return Q packed, L and R with Q + L R near W."""
    bnb = import_module("bitsandbytes")
    weight, rank = weight.float(), min(how.rank, *weight.shape)
    rest, packed, found = weight, None, []
    for _ in range(how.refine + 1):
        U, S, Vh = svd(rest, rank, "top") if rank < min(weight.shape) else svd(rest)
        left, right = (U * S.sqrt()).to(dtype), (S.sqrt()[:, None] * Vh).to(dtype)
        beside = left.float() @ right.float()
        if packed is not None:
            found.append((float(torch.linalg.vector_norm(rest - beside)), packed, left, right))
        # in the dtype that all of W would be packed from, which is the one that Q's values are in
        packed = bnb.nn.Params4bit((weight - beside).to(dtype), requires_grad=False, quant_type="nf4").to(weight.device)
        rest = weight - bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()
        found.append((float(torch.linalg.vector_norm(rest - beside)), packed, left, right))
        found = [min(found, key=lambda candidate: candidate[0])]
    return found[0][1:]


_COMMON = ("inputs will be cast from", "Failed to load CPU gemm_4bit_forward")


def _hush() -> None:
    """Leave out what bitsandbytes says in every layer of every pass."""
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logger = logging.getLogger(name)
        if _told not in logger.filters:
            logger.addFilter(_told)


def _told(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _COMMON)

"""Dropout by sixteen random bits a number, where a processor would draw a number for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.private import is_transformed
from spectune.speed.autograd import Context
from spectune.speed.recompute_cache import current_cache

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """Return x with each number zero with probability p, and divided by 1 - p otherwise.

    On a processor p is rounded to a multiple of 2^-16, and a gradient keeps a byte a number.

    Args:
        x: of any shape.
        p: from 0 to 1.
    """
    if x.device.type not in ("cpu", "meta") or p >= 1 or torch.compiler.is_compiling() or is_transformed():
        return F.dropout(x, p)
    if (cache := current_cache()) is not None:
        cache.materialize()
    return _Dropout.apply(x, round(p * _LEVELS))


class _DropoutContext(Context):
    scale: float


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _DropoutContext, x: Tensor, level: int) -> Tensor:
        # random_ fills 64 bits at the price of a float's: each is four draws of 16
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= level - _LEVELS // 2
        ctx.save_for_backward(kept)
        ctx.scale = _LEVELS / (_LEVELS - level)
        return _masked(x, kept, ctx.scale)

    @staticmethod
    def backward(ctx: _DropoutContext, *grads: Tensor) -> tuple[Tensor, None]:
        return _masked(grads[0], ctx.saved_tensors[0], ctx.scale), None


def _masked(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    return torch.where(kept, x, 0).mul_(scale)

"""A linear layer and its update in one autograd node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectune.layers.factors import Factors
from spectune.layers.recompute import current_tape

_SMALLEST = 1e-6  # the gradient of a ratio divides by it


def adapted_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Factors, ratio: Tensor | None = None
) -> Tensor:
    """Return y = ratio * (x W^T + s (x R^T) C^T L^T) + bias with the gradients of x, L, C, R and ratio.

    What autograd would do with the parts, less its copies: the factors are cast and x is not, the update and its
    gradient are added in place, what is kept for the backward pass is x (if R trains), the small x R^T, and y itself
    (if ratio trains), which the next layer mostly keeps as well.  The PyTorch code is the reference for a fused kernel.

    Args:
        x: (n x in), in W's dtype.
        weight: W (out x in), frozen; None where L C R is the whole weight.
        bias: (out), frozen, or None.
        update: s L C R.
        ratio: (out), a factor for each output; None is one.
    """
    values = getattr(update.core, "values", None)
    return _AdaptedLinear.apply(x, weight, bias, update.left, update.right, values, ratio, update.core, update.scale)  # type: ignore[return-value]


def _output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, u: Tensor, L: Tensor, scale: float, ratio: Tensor | None
) -> Tensor:
    added = bias if ratio is None else None
    if weight is None:
        y = F.linear(u * scale if scale != 1 else u, L, added)
    else:
        y = F.linear(x, weight, added).addmm_(u, L.mT, alpha=scale)
    if ratio is not None:
        y.mul_(ratio)
        if bias is not None:
            y.add_(bias)
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        values: Tensor | None,
        ratio: Tensor | None,
        core: Any,
        scale: float,
    ) -> Tensor:
        L, R = left.to(x.dtype), right.to(x.dtype)
        if ratio is not None:
            ratio = torch.where(ratio.abs() < _SMALLEST, _SMALLEST, ratio)
        tape = current_tape()
        known = tape.recall() if tape is not None else None
        t = F.linear(x, R) if known is None else known[1]
        u = core.apply(t)
        y = _output(x, weight, bias, u, L, scale, ratio) if known is None else known[0]
        if tape is not None:
            tape.keep(y, t)
        of_left, of_right, of_values, of_ratio = ctx.needs_input_grad[3:7]
        ctx.save_for_backward(
            x if of_right else None,
            t if of_values else None,
            u if of_left else None,
            y if of_ratio else None,
            *(weight, bias, L, R, values, ratio),
        )
        ctx.core, ctx.scale = core if values is None else replace(core, values=None), scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, t, u, y, weight, bias, L, R, values, ratio = ctx.saved_tensors
        (grad,) = grads
        to_left = to_right = to_ratio = to_x = None
        if ratio is not None:
            if ctx.needs_input_grad[6]:
                product = grad * (y if bias is None else y - bias)
                to_ratio = product.sum(0).to(ratio.dtype) / ratio  # summed in float32 whatever the dtype
            grad = grad * ratio.to(grad.dtype)
        core = ctx.core if values is None else replace(ctx.core, values=values)
        to_u = grad @ L
        if ctx.scale != 1:
            to_u *= ctx.scale
        if ctx.needs_input_grad[3]:
            to_left = (u.mT @ grad).mT * ctx.scale  # in this order, as the thinner side comes first
        to_t, to_values = core.gradients(t, to_u, ctx.needs_input_grad[5])
        if ctx.needs_input_grad[4]:
            to_right = to_t.mT @ x
        if ctx.needs_input_grad[0]:
            to_x = to_t @ R if weight is None else (grad @ weight).addmm_(to_t, R)
        return to_x, None, None, to_left, to_right, to_values, to_ratio, None, None

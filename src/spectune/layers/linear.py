"""A linear layer and its update in one autograd node."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers import products
from spectune.layers.cores import Core
from spectune.layers.factors import Factors
from spectune.layers.kernels import kernels
from spectune.speed.autograd import Context
from spectune.speed.dense import linear, matmul
from spectune.speed.recompute_cache import current_cache

_FEW_ROWS = 256  # a kernel takes rows in blocks, and fewer than these leave most of a GPU idle
_SMALLEST = 1e-6  # the gradient of a ratio divides by it


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    update: Factors,
    ratio: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """Return y = ratio * (x W^T + s (x R^T) C^T L^T) + bias with the gradients of x, L, C, R and ratio.

    What autograd would do with the parts, less its copies: the factors are cast and x is not, the update and its
    gradient are added in place, what is kept for the backward pass is x (if R trains), the small x R^T, and y itself
    (if ratio trains), which the next layer mostly keeps as well.  The products with thin factors are kernels on a GPU
    (`spectune.layers.kernels`); what these compute is said by `spectune.layers.products`.

    Args:
        x: (n x in), in W's dtype.
        weight: W (out x in), frozen; None where L C R is the whole weight.
        bias: (out), frozen, or None.
        update: s L C R.
        ratio: (out), a factor for each output; None is one.
        training: take the fastest product with W; else the one that the layer itself would take, to the last bit.
    """
    values = getattr(update.core, "values", None)
    return _AdaptedLinear.apply(
        x, weight, bias, update.left, update.right, values, ratio, update.core, update.scale, training
    )


def _products(x: Tensor, weight: Tensor | None, left: Tensor, right: Tensor) -> ModuleType:
    """Return the module whose products with thin factors these operands take."""
    if weight is None or len(x) < _FEW_ROWS:
        return products
    low_rank = kernels("low_rank", x, left, right)
    return products if low_rank is None or max(left.shape[1], right.shape[0]) > low_rank.WIDEST[x.dtype] else low_rank


def _output(
    ops: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    u: Tensor,
    L: Tensor,
    scale: float,
    ratio: Tensor | None,
    training: bool,
) -> Tensor:
    before, after = (bias, None) if ratio is None else (None, bias)
    if weight is None:
        return products.finish(linear(u * scale if scale != 1 else u, L, before), ratio, after)
    product = linear if training else F.linear
    return ops.add(product(x, weight, before), u, L, scale, ratio, after)


class _LinearContext(Context):
    core: Core
    scale: float
    ops: ModuleType


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LinearContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        values: Tensor | None,
        ratio: Tensor | None,
        core: Core,
        scale: float,
        training: bool,
    ) -> Tensor:
        ops = _products(x, weight, left, right)
        L, R = ops.factor(left, x.dtype), ops.factor(right, x.dtype)
        own_ratio = ratio
        # DoRA's m can pass through zero, where y / ratio, from which the gradient of the ratio is taken, would not be
        # finite
        if ratio is not None:
            ratio = torch.where(ratio.abs() < _SMALLEST, _SMALLEST, ratio)
        cache = current_cache()
        of_left, of_right, of_values, of_ratio = ctx.needs_input_grad[3:7]
        if cache is None or (known := cache.recall()) is None:
            t, u = ops.project(x, R, core)
            y = _output(ops, x, weight, bias, u, L, scale, ratio, training)
        else:
            kept, t = cast("tuple[Tensor | None, Tensor]", known)
            u = core.apply(t)
            if (y := kept) is None:  # a region's last product, which mostly nobody looks at
                y = cache.again(len(L), x, lambda: _output(ops, x, weight, bias, u, L, scale, ratio, training))
        if cache is not None:
            cache.keep(y, t, looked_at=of_ratio)
        kept: Any = (  # None stays None, which the type of `save_for_backward` does not say
            x if of_right else None,
            t if of_values else None,
            u if of_left else None,
            y if of_ratio else None,
            *(weight, bias, L, R, values, ratio, own_ratio),
        )
        ctx.save_for_backward(*kept)
        ctx.core, ctx.scale, ctx.ops = core if values is None else core.holding(None), scale, ops
        return y

    @staticmethod
    def backward(ctx: _LinearContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        try:
            x, t, u, y, weight, bias, L, R, values, ratio, own_ratio = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error) or not ctx.needs_input_grad[6]:
                raise
            raise SpectuneError(
                "an operation in place, such as ReLU(inplace=True), wrote over the output of a DoRA layer, which its "
                "magnitude learns from: make that operation one with inplace=False"
            ) from None
        # a backward pass with create_graph=True: the fast formulas below write in place, and no graph could come of
        # them
        if torch.is_grad_enabled():
            return _differentiable(ctx, grads[0], x, weight, bias, L, R, values, own_ratio)
        (grad,) = grads
        ops = ctx.ops
        to_left = to_right = to_ratio = to_x = None
        if ratio is not None:
            grad, to_ratio = ops.through_ratio(grad, y, bias, ratio)
        core = ctx.core if values is None else ctx.core.holding(values)
        to_u, _ = ops.project(grad, L.mT, scale=ctx.scale)
        if ctx.needs_input_grad[3]:
            to_left = ops.over_rows(grad, u, ctx.scale)
        to_t, to_values = core.gradients(t, to_u, ctx.needs_input_grad[5])
        if ctx.needs_input_grad[4]:
            to_right = ops.over_rows(to_t, x)
        if ctx.needs_input_grad[0]:
            to_x = matmul(to_t, R) if weight is None else ops.add(matmul(grad, weight), to_t, R.mT)
        return to_x, None, None, to_left, to_right, to_values, to_ratio, None, None, None


def _differentiable(
    ctx: _LinearContext,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    L: Tensor,
    R: Tensor,
    values: Tensor | None,
    ratio: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients as functions that can be differentiated again: those of the plain operations."""
    needs = ctx.needs_input_grad
    if x is None or (x.dtype is not torch.float64 and x.dtype is not torch.float32):
        raise SpectuneError(
            "a gradient of a gradient is not there for an adapted layer in 16 bits, nor where its factors are frozen "
            "(svf, svft, lora_xs): take it with torch.func.grad, in float32"
        )
    core = ctx.core if values is None else ctx.core.holding(values)
    y = F.linear(core.apply(F.linear(x, R)), L) * ctx.scale
    if weight is not None:
        y = y + F.linear(x, weight)
    if ratio is not None:
        y = y * ratio
    inputs: dict[int, Tensor | None] = {0: x, 3: L, 4: R, 5: values, 6: ratio}
    wanted = [i for i, tensor in inputs.items() if needs[i] and tensor is not None]
    found = torch.autograd.grad(y, [t for i in wanted if (t := inputs[i]) is not None], grad, create_graph=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(i) for i in range(10))

"""A linear layer and its update in one autograd node."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, cast

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


def products_of(x: Tensor, weight: Tensor | None, left: Tensor, right: Tensor) -> ModuleType:
    """Return the module whose products with thin factors these operands take."""
    if weight is None or len(x) < _FEW_ROWS:
        return products
    low_rank = kernels("low_rank", x, left, right)
    return products if low_rank is None or max(left.shape[1], right.shape[0]) > low_rank.WIDEST[x.dtype] else low_rank


def output(
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
    # DoRA has the bias outside of its magnitude; without a ratio it goes into the product with W, where it is free
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
        ops = products_of(x, weight, left, right)
        L, R = ops.factor(left, x.dtype), ops.factor(right, x.dtype)
        own_ratio, ratio = ratio, None if ratio is None else away_from_zero(ratio)
        cache = current_cache()
        of_left, of_right, of_values, of_ratio = ctx.needs_input_grad[3:7]
        if cache is None or (known := cache.recall()) is None:
            t, u = ops.project(x, R, core)
            y = output(ops, x, weight, bias, u, L, scale, ratio, training)
        else:
            kept, t = cast("tuple[Tensor | None, Tensor]", known)
            u = core.apply(t)
            if (y := kept) is None:  # a region's last product, which mostly nobody looks at
                y = cache.again(len(L), x, lambda: output(ops, x, weight, bias, u, L, scale, ratio, training))
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
        # the values are among what is saved, where a write in place is noticed and which goes with the graph: of a
        # tensor that hangs on ctx itself neither is true
        ctx.core, ctx.scale, ctx.ops = core if values is None else core.holding(None), scale, ops
        return y

    @staticmethod
    def backward(ctx: _LinearContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        x, t, u, y, weight, bias, L, R, values, ratio, own_ratio = saved(ctx, needs[6])
        wanted = Gradients(needs[0], *needs[3:7])
        operands = Operands(weight, bias, L, R, ctx.core if values is None else ctx.core.holding(values), ctx.scale)
        # a backward pass with create_graph=True: the fast formulas below write in place, and no graph could come of
        # them
        if torch.is_grad_enabled():
            found = differentiable(wanted, grads[0], x, operands, own_ratio)
        else:
            found = gradients(wanted, grads[0], Kept(x, t, u, y), operands, ratio, ctx.ops)
        return found[0], None, None, *found[1:], None, None, None


def away_from_zero(ratio: Tensor) -> Tensor:
    """Return a ratio that y can be divided by, as its gradient is taken: DoRA's m can pass through zero."""
    return torch.where(ratio.abs() < _SMALLEST, _SMALLEST, ratio)


def saved(ctx: Context, of_ratio: bool) -> tuple[Any, ...]:
    """Return what a call kept, y among it where a ratio trains."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error) or not of_ratio:
            raise
        raise SpectuneError(
            "an operation in place, such as ReLU(inplace=True), wrote over the output of a DoRA layer, which its "
            "magnitude learns from: make that operation one with inplace=False"
        ) from None


class Operands(NamedTuple):
    """What x is multiplied by: W, its bias, and s L C R."""

    weight: Tensor | None
    bias: Tensor | None
    L: Tensor
    R: Tensor
    core: Core
    scale: float


class Kept(NamedTuple):
    """What the backward pass looks at: x, x R^T, that through the core, and y."""

    x: Tensor | None
    t: Tensor | None
    u: Tensor | None
    y: Tensor | None


class Gradients(NamedTuple):
    """Of x, L, R, the core's values and the ratio: whether they are wanted, or what they are."""

    x: Any = None
    left: Any = None
    right: Any = None
    values: Any = None
    ratio: Any = None


def gradients(
    wanted: Gradients, grad: Tensor, kept: Kept, to: Operands, ratio: Tensor | None, ops: ModuleType
) -> Gradients:
    """Return the gradients, given that of y; in place, so that nothing could be differentiated again."""
    to_left = to_right = to_ratio = to_x = None
    grad = grad.contiguous()  # a part of a fused layer's is not, and has slower products
    if ratio is not None:
        grad, to_ratio = ops.through_ratio(grad, kept.y, to.bias, ratio)
    to_u, _ = ops.project(grad, to.L.mT, scale=to.scale)
    if wanted.left:
        to_left = ops.over_rows(grad, kept.u, to.scale)
    to_t, to_values = to.core.gradients(cast(Tensor, kept.t), to_u, wanted.values)
    if wanted.right:
        to_right = ops.over_rows(to_t, kept.x)
    if wanted.x:
        to_x = matmul(to_t, to.R) if to.weight is None else ops.add(matmul(grad, to.weight), to_t, to.R.mT)
    return Gradients(to_x, to_left, to_right, to_values, to_ratio)


def differentiable(wanted: Gradients, grad: Tensor, x: Tensor | None, to: Operands, ratio: Tensor | None) -> Gradients:
    """Return the gradients as functions that can be differentiated again: those of the plain operations."""
    if x is None or (x.dtype is not torch.float64 and x.dtype is not torch.float32):
        raise SpectuneError(
            "a gradient of a gradient is not there for an adapted layer in 16 bits, nor where its factors are frozen "
            "(svf, svft, lora_xs): take it with torch.func.grad, in float32"
        )
    # the forward pass once more, in operations that autograd knows, instead of a second set of formulas for the
    # derivatives of the derivatives
    y = F.linear(to.core.apply(F.linear(x, to.R)), to.L) * to.scale
    if to.weight is not None:
        y = y + F.linear(x, to.weight)
    if ratio is not None:
        y = y * ratio
    inputs = (x, to.L, to.R, to.core.values, ratio)
    which = [i for i, tensor in enumerate(inputs) if wanted[i] and tensor is not None]
    found = torch.autograd.grad(y, [t for i in which if (t := inputs[i]) is not None], grad, create_graph=True)
    grads = dict(zip(which, found, strict=True))
    return Gradients(*(grads.get(i) for i in range(len(inputs))))

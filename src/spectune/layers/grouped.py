"""Layers whose weights lie in one tensor, each with rows of its own, and their updates in one autograd node.

Each row is given what its layer alone would give it, to the last bit: the products are the same.  One node, one look at
which adapters answer and one pass for DoRA's norms take the place of as many as there are layers, which are dozens of
experts with a few tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spectune.layers.cores import Core
from spectune.layers.factors import Factors
from spectune.layers.linear import (
    Gradients,
    Kept,
    Operands,
    away_from_zero,
    differentiable,
    gradients,
    output,
    products_of,
    saved,
)
from spectune.speed.autograd import Context
from spectune.speed.recompute_cache import current_cache, learns


def together(layers: Sequence[Any], x: Tensor, sizes: Sequence[int], written: bool) -> Tensor | None:
    """Return what adapted layers answer, each to rows of its own, or None where they are to be asked one by one.

    Args:
        layers: parts of one tensor, each with rows.
        x: (n x in), the rows of the first layer first.
        sizes: how many rows each layer has.
        written: somebody may write to the answer.
    """
    first = layers[0]
    if not learns() or not all(hasattr(layer, "alone") for layer in layers):
        return None
    selection = first.selection
    scope = selection.scope_with_gradients() if torch.is_grad_enabled() else selection.scope()
    updates = [layer.alone(scope) if layer.selection is selection else None for layer in layers]
    update = updates[0]
    if update is None or not update.method.in_factors or not first.fuses(x):
        return None
    method = update.method
    if any(u is None or u.method != method or u.training is not update.training for u in updates):
        return None
    if update.training and method.drop:
        return None
    tensors = [layer.tensors(u) for layer, u in zip(layers, updates, strict=True)]
    wholes = [layer.whole(u, t) for layer, u, t in zip(layers, updates, tensors, strict=True)]
    whole = wholes[0] is not None
    if any((w is not None) is not whole for w in wholes):
        return None
    ratio = None
    if not method.additive:
        ratio = method.ratios(tensors, [layer.base() for layer in layers])
        if ratio is None:
            return None
    factors = wholes if whole else [method.factors(t) for t in tensors]
    weight = None if whole else first.weight_of_all()
    y = _linear(x, sizes, weight, [layer.index for layer in layers], factors, ratio, update.training)
    selection.in_graph(scope, y)
    return y.clone() if written and (ratio is not None or current_cache() is not None) else y  # which is kept


class _Plan(NamedTuple):
    """How rows are divided, and what each part of them is multiplied by besides tensors."""

    sizes: Sequence[int]
    places: Sequence[int]  # of the weights in their tensor
    cores: Sequence[Core]
    scale: float
    training: bool


def _linear(
    x: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None,
    places: Sequence[int],
    factors: Sequence[Factors],
    ratio: Tensor | None,
    training: bool,
) -> Tensor:
    """Return `spectune.layers.linear.adapted_linear` of each piece of x, end to end.

    Args:
        x: (n x in).
        sizes: of its pieces.
        weight: (layers x out x in), all there are; None where L C R is the whole weight.
        places: where each piece's W is among them.
        factors: of each piece.
        ratio: (pieces x out), or None.
        training: take the fastest product with W.
    """
    values = [getattr(f.core, "values", None) for f in factors]
    cores = [f.core if v is None else f.core.holding(None) for f, v in zip(factors, values, strict=True)]
    plan = _Plan(sizes, places, cores, factors[0].scale, training)
    # autograd sees the tensors that are arguments, and no others: cores go into the plan empty, and what they hold
    # goes beside it
    trained = [v for v in values if v is not None]
    return _Grouped.apply(x, weight, ratio, plan, *(f.left for f in factors), *(f.right for f in factors), *trained)


class _GroupedContext(Context):
    plan: _Plan
    ops: list[ModuleType]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _GroupedContext, x: Tensor, weight: Tensor | None, ratio: Tensor | None, plan: _Plan, *factors: Tensor
    ) -> Tensor:
        count = len(plan.sizes)
        pieces = x.split(plan.sizes)
        weights = _of_pieces(weight, plan)
        ops = [
            products_of(*operands)
            for operands in zip(pieces, weights, factors[:count], factors[count : 2 * count], strict=True)
        ]
        lefts = [o.factor(left, x.dtype) for o, left in zip(ops, factors[:count], strict=True)]
        rights = [o.factor(right, x.dtype) for o, right in zip(ops, factors[count : 2 * count], strict=True)]
        values = factors[2 * count :]
        cores = _holding(plan.cores, values)
        ratios = [None] * count if ratio is None else away_from_zero(ratio).unbind()
        of_left, of_right, of_values = _wanted(ctx, count)
        # filled below in either way. `made` may be called when this method is over: the cache asks for the product
        # only if somebody looks at it
        us: list[Tensor] = []

        def made() -> Tensor:
            each = zip(ops, pieces, weights, us, lefts, ratios, strict=True)
            return torch.cat([output(o, p, w, None, u, L, plan.scale, r, plan.training) for o, p, w, u, L, r in each])

        cache = current_cache()
        if cache is None or (known := cache.recall()) is None:
            both = [o.project(p, R, core) for o, p, R, core in zip(ops, pieces, rights, cores, strict=True)]
            ts, us[:] = [t for t, _ in both], [u for _, u in both]
            y = made()
        else:
            kept, *ts = cast("tuple[Tensor, ...]", known)
            us[:] = [core.apply(t) for core, t in zip(cores, ts, strict=True)]
            y = cache.again(len(lefts[0]), x, made) if kept is None else kept
        if cache is not None:
            cache.keep(y, *ts, looked_at=ctx.needs_input_grad[2])
        nothing = [None] * count
        held: Any = (
            *(x if of_right else None, y if ctx.needs_input_grad[2] else None, weight, ratio),
            *(*lefts, *rights, *(ts if of_values else nothing), *(us if of_left else nothing), *values),
        )
        ctx.save_for_backward(*held)
        ctx.plan, ctx.ops = plan, ops
        return y

    @staticmethod
    def backward(ctx: _GroupedContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, len(ctx.plan.sizes)
        x, y, weight, ratio, *more = saved(ctx, ctx.needs_input_grad[2])
        lefts, rights, ts, us = (more[i * count : (i + 1) * count] for i in range(4))
        cores = _holding(plan.cores, more[4 * count :])
        weights = _of_pieces(weight, plan)
        nothing = [None] * count
        own_ratios = nothing if ratio is None else ratio.unbind()
        ratios = nothing if ratio is None else away_from_zero(ratio).unbind()
        xs, ys = (nothing if t is None else t.split(plan.sizes) for t in (x, y))
        wanted = Gradients(ctx.needs_input_grad[0], *_wanted(ctx, count), ctx.needs_input_grad[2])
        found: list[Gradients] = []
        for i, grad in enumerate(grads[0].split(plan.sizes)):
            operands = Operands(weights[i], None, lefts[i], rights[i], cores[i], plan.scale)
            if torch.is_grad_enabled():
                found.append(differentiable(wanted, grad, xs[i], operands, own_ratios[i]))
            else:
                kept = Kept(xs[i], ts[i], us[i], ys[i])
                found.append(gradients(wanted, grad, kept, operands, ratios[i], ctx.ops[i]))
        to_x = torch.cat([f.x for f in found]) if wanted.x else None
        to_ratio = torch.stack([f.ratio for f in found]) if wanted.ratio else None
        of_values = [f.values for f in found] if len(more) > 4 * count else []
        return to_x, None, to_ratio, None, *(f.left for f in found), *(f.right for f in found), *of_values


def _of_pieces(weight: Tensor | None, plan: _Plan) -> Sequence[Tensor | None]:
    """Return W of each piece."""
    if weight is None:
        return [None] * len(plan.sizes)
    # views, all of them in one call: dozens of slices cost more than the products of a few tokens
    all_of_them = weight.unbind()
    return [all_of_them[i] for i in plan.places]


def _holding(cores: Sequence[Core], values: Sequence[Tensor]) -> Sequence[Core]:
    """Return cores with their values."""
    return [core.holding(v) for core, v in zip(cores, values, strict=True)] if values else cores


def _wanted(ctx: Context, count: int) -> tuple[bool, bool, bool]:
    """Whether the gradients of L, of R and of the cores' values are wanted, which is the same for all pieces."""
    of_values = 4 + 2 * count
    needs = ctx.needs_input_grad
    return needs[4], needs[4 + count], len(needs) > of_values and needs[of_values]

"""The products that autograd would do wastefully: banded and sparse cores, with gradients of their own.

Each is written in plain PyTorch and is the reference for a fused kernel that may take its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements gathered at once by the sparse core's gradient: 16 MiB of float32


def band_entries(size: int, width: int) -> int:
    """Count the entries of a banded size x size core: size (2 width + 1) - width (width + 1)."""
    width = min(width, size - 1)
    return size * (2 * width + 1) - width * (width + 1)


def band_indices(size: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows and columns of a banded core's entries, in the order of its `values`."""
    rows = [torch.arange(max(0, -d), min(size, size - d)) for d in _offsets(size, width)]
    columns = [r + d for r, d in zip(rows, _offsets(size, width), strict=True)]
    return torch.cat(rows), torch.cat(columns)


def _offsets(size: int, width: int) -> range:
    width = min(width, size - 1)
    return range(-width, width + 1)


def _diagonals(size: int, width: int, transpose: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield for each diagonal its slice of values, of the output and of the input."""
    start = 0
    for d in _offsets(size, width):
        length = size - abs(d)
        output, source = slice(max(0, -d), max(0, -d) + length), slice(max(0, d), max(0, d) + length)
        yield slice(start, start + length), *((source, output) if transpose else (output, source))
        start += length


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, values: Tensor, width: int, transpose: bool) -> Tensor:
        ctx.save_for_backward(t, values)
        ctx.width, ctx.transpose = width, transpose
        out = torch.zeros_like(t)
        for entry, to, of in _diagonals(t.shape[-1], width, transpose):
            out[..., to].addcmul_(t[..., of], values[..., entry])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        t, values = ctx.saved_tensors
        (grad,) = grads
        to_t = banded_product(grad, values, ctx.width, not ctx.transpose) if ctx.needs_input_grad[0] else None
        to_values = None
        if ctx.needs_input_grad[1]:
            pieces = [
                (grad[..., to] * t[..., of]).sum_to_size(values[..., entry].shape)
                for entry, to, of in _diagonals(t.shape[-1], ctx.width, ctx.transpose)
            ]
            to_values = torch.cat(pieces, dim=-1)
        return to_t, to_values, None, None


def banded_product(t: Tensor, values: Tensor, width: int, transpose: bool) -> Tensor:
    """Multiply by a banded core: t C^T, or t C if `transpose`, as 2 width + 1 shifted elementwise products.

    Args:
        t: (..., size).
        values: (entries), or (batch, 1, ..., entries) against t's leading axis.
        width: entries are those with |i - j| <= width.
        transpose: multiply by C instead of its transpose.
    """
    return _Banded.apply(t, values, width, transpose)  # type: ignore[return-value]


@torch.library.custom_op("spectune::sparse_product", mutates_args=())
def sparse_product(t: Tensor, values: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Multiply by a sparse core: out[..., to] += values * t[..., of].

    An operator of its own, because torch.compile does not trace sparse tensors.

    Args:
        t: (..., size).
        values, to, of: (entries): the entries, the output index and the input index of each.
    """
    rows = t.reshape(-1, t.shape[-1])
    matrix = torch.sparse_coo_tensor(torch.stack([to, of]), values, (t.shape[-1],) * 2, check_invariants=False)
    return torch.sparse.mm(matrix, rows.mT).mT.reshape(t.shape).contiguous()


@sparse_product.register_fake
def _(t: Tensor, values: Tensor, to: Tensor, of: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _save_sparse(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sparse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    t, values, to, of = ctx.saved_tensors
    to_t = sparse_product(grad, values, of, to) if ctx.needs_input_grad[0] else None
    to_values = sparse_entries(grad, t, to, of) if ctx.needs_input_grad[1] else None
    return to_t, to_values, None, None


def sparse_entries(grad: Tensor, t: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Return sum over rows of grad[..., to] * t[..., of], (entries), a piece of the entries at a time."""
    g, s = grad.reshape(-1, t.shape[-1]).mT, t.reshape(-1, t.shape[-1]).mT
    step = max(1, _CHUNK // max(1, s.shape[1]))
    return torch.cat([(g[i] * s[j]).sum(-1) for i, j in zip(to.split(step), of.split(step), strict=True)])


sparse_product.register_autograd(_sparse_backward, setup_context=_save_sparse)

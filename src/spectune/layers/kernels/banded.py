"""Products with a banded core as Triton kernels: each entry of t is read from memory once, and from the cache after.

What they compute is said by `banded_product` and `banded_entries` of `spectune.layers.core_ops`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectune.layers.kernels import blocks, parts

jit: Any = triton.jit  # type checkers know no grid

WIDEST = 64  # the work grows with the width, and PyTorch's blocks fill tensor cores where a band is wide


@jit
def _before(d, size, width):
    """The entries of the diagonals before the one at offset d: sum over e from -width to d - 1 of size - |e|."""
    count = d + width
    below = tl.where(d <= 0, count * width - count * (count - 1) // 2, width * (width + 1) // 2 + d * (d - 1) // 2)
    return count * size - below


@jit
def _product(
    t, values, out, n, size, width, t_b, t_n, t_k, values_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    inside = (rows < n) & (column < size)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # t is read from memory at the first shift, and from the cache at all others, which look one column further each
    for shift in range(-width, width + 1):
        other = column + shift  # the column of t that meets this column of the answer
        if TRANSPOSE:
            d, row = -shift, other
        else:
            d, row = shift, column
        there = (column < size) & (other >= 0) & (other < size)
        place = _before(d, size, width) + row - tl.maximum(0, -d)
        value = tl.load(values + batch * values_b + place, mask=there, other=0.0).to(tl.float32)
        part = tl.load(
            t + batch * t_b + rows * t_n + other.to(tl.int64)[None, :] * t_k, mask=inside & there[None, :], other=0.0
        )
        total += part.to(tl.float32) * value[None, :]
    tl.store(out + (batch * n + rows) * size + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@jit
def _entries(
    grad, t, out, n, size, width, share, batches, entries, grad_b, grad_n, grad_k, t_b, t_n, t_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIAGONALS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.program_id(1) * DIAGONALS + tl.arange(0, DIAGONALS) - width
    batch = (tl.program_id(2) % batches).to(tl.int64)
    split = (tl.program_id(2) // batches).to(tl.int64)
    other = column[None, :] + d[:, None]
    there = (column < size)[None, :] & (d <= width)[:, None] & (other >= 0) & (other < size)
    total = tl.zeros((DIAGONALS, COLUMNS), tl.float32)
    for start in range(0, share, ROWS):
        rows = split * share + start + tl.arange(0, ROWS)
        g = tl.load(
            grad + batch * grad_b + rows[:, None] * grad_n + column.to(tl.int64)[None, :] * grad_k,
            mask=(rows < n)[:, None] & (column < size)[None, :],
            other=0.0,
        )
        part = tl.load(
            t + batch * t_b + rows[:, None, None] * t_n + other.to(tl.int64)[None, :, :] * t_k,
            mask=(rows < n)[:, None, None] & there[None, :, :],
            other=0.0,
        )
        total += tl.sum(g.to(tl.float32)[:, None, :] * part.to(tl.float32), 0)
    place = _before(d, size, width)[:, None] + column[None, :] - tl.maximum(0, -d)[:, None]
    tl.store(out + (split * batches + batch) * entries + place, total, mask=there)


def product(t: Tensor, values: Tensor, width: int, transpose: bool) -> Tensor:
    """Return t C^T, or t C if `transpose`, for t (n, size) or (batch, n, size)."""
    n, size = t.shape[-2:]
    stacked = t if t.dim() == 3 else t[None]
    values = values.contiguous()
    out = t.new_empty(t.shape)
    grid = (blocks(n, 16), blocks(size, 128), len(stacked))
    with torch.cuda.device_of(t):
        _product[grid](
            stacked, values, out, n, size, min(width, size - 1), *stacked.stride(),
            0 if values.dim() == 1 else values.shape[1], ROWS=16, COLUMNS=128, TRANSPOSE=transpose,
        )  # fmt: skip
    return out


def entries(grad: Tensor, t: Tensor, width: int, transpose: bool, count: int) -> Tensor:
    """Return the gradient of `product` with respect to its `count` values, (count) or (batch, count)."""
    # the gradient of t C is that of t C^T with the two exchanged
    if transpose:
        grad, t = t, grad
    n, size = t.shape[-2:]
    g, stacked = (s if s.dim() == 3 else s[None] for s in (grad, t))
    batches, width = len(stacked), min(width, size - 1)
    across, diagonals = blocks(size, 64), blocks(2 * width + 1, 16)
    splits, share = parts(n, 4, across * diagonals * batches)
    out = t.new_empty(splits, batches, count, dtype=torch.float32)
    with torch.cuda.device_of(t):
        _entries[(across, diagonals, splits * batches)](
            g, stacked, out, n, size, width, share, batches, count, *g.stride(), *stacked.stride(),
            ROWS=4, COLUMNS=64, DIAGONALS=16,
        )  # fmt: skip
    return out.sum(0).to(t.dtype).reshape(*t.shape[:-2], count)


def agrees(device: torch.device) -> bool:
    """Whether every kernel here runs on a device and answers what PyTorch does, on a small case."""
    t = torch.linspace(-1, 1, 60, device=device).sin().reshape(12, 5)
    values = torch.arange(1.0, 14, device=device)
    low, middle, high = (torch.diag(v, d) for v, d in zip(values.split([4, 5, 4]), (-1, 0, 1), strict=True))
    C = low + middle + high
    grad = t.mT.reshape(12, 5)
    outer = grad.mT @ t
    pairs = [
        (product(t, values, 1, False), t @ C.mT),
        (product(t, values, 1, True), t @ C),
        (entries(grad, t, 1, False, 13), torch.cat([outer.diagonal(d) for d in (-1, 0, 1)])),
    ]
    return all(torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2) for ours, theirs in pairs)

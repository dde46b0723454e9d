"""Products with factors of low rank, as Triton kernels: the same functions as `spectune.layers.products`.

Every operand is read once, as it is: float32 factors are cast where they are loaded, sums are float32, and what is
n x out is written once.  Sums over rows are added in a fixed order, so that results repeat bit for bit.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectune.layers.kernels import INTERPRETED, blocks, parts
from spectune.layers.products import Middle
from spectune.speed.dense import float32_is_exact

jit: Any = triton.jit  # type checkers know no grid

# beyond this rank the products are cuBLAS's; float32 is multiplied without tensor cores
WIDEST = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}


@jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b, with b cast to a's dtype, summed in float32."""
    b = b.to(a.dtype)
    if PRECISION == "interpreted":  # Triton's interpreter multiplies no bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def _project(
    x, R, core, t, u, n, size, rank, scale, x_n, x_k, R_r, R_k, core_n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, CORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # 64-bit places: n x size passes 2^31 with 32,000 tokens in 65,536 features
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, size, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        part = tl.load(x + rows * x_n + columns * x_k, mask=(rows < n) & (columns < size), other=0.0)
        factor = tl.load(
            R + ranks[:, None] * R_r + columns * R_k, mask=(ranks[:, None] < rank) & (columns < size), other=0.0
        )
        total = _dot(part, tl.trans(factor), total, PRECISION)
    total *= scale
    place, inside = rows * rank + ranks[None, :], (rows < n) & (ranks[None, :] < rank)
    tl.store(t + place, total.to(t.dtype.element_ty), mask=inside)
    if CORE:
        diagonal = tl.load(core + rows * core_n + ranks[None, :], mask=inside, other=0.0)
        tl.store(u + place, (total * diagonal.to(tl.float32)).to(u.dtype.element_ty), mask=inside)


@jit
def _add(
    y, u, L, ratio, bias, n, size, rank, scale, y_n, y_k, u_n, u_r, L_k, L_r,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, RATIO: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)[None, :]
    part = tl.load(u + rows * u_n + ranks * u_r, mask=(rows < n) & (ranks < rank), other=0.0)
    factor = tl.load(L + column[:, None] * L_k + ranks * L_r, mask=(column[:, None] < size) & (ranks < rank), other=0.0)
    total = _dot(part, tl.trans(factor), tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION) * scale
    place, inside = y + rows * y_n + column[None, :] * y_k, (rows < n) & (column[None, :] < size)
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if RATIO:
        total *= tl.load(ratio + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@jit
def _over_rows(
    a, b, out, n, size, rank, scale, share, a_n, a_k, b_n, b_r, out_s, out_k, out_r,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = (tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    ranks = tl.arange(0, RANK)[None, :]
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    first = tl.program_id(1).to(tl.int64) * share
    # each split writes sums of its own, which are added afterwards: atomic additions would come in another order each
    # time
    for start in range(0, share, ROWS):
        rows = (first + start + tl.arange(0, ROWS))[:, None]
        wide = tl.load(a + rows * a_n + columns * a_k, mask=(rows < n) & (columns < size), other=0.0)
        thin = tl.load(b + rows * b_n + ranks * b_r, mask=(rows < n) & (ranks < rank), other=0.0)
        total = _dot(tl.trans(wide), thin, total, PRECISION)
    column = tl.trans(columns)
    place = out + tl.program_id(1).to(tl.int64) * out_s + column * out_k + ranks * out_r
    tl.store(place, total * scale, mask=(column < size) & (ranks < rank))


@jit
def _through_ratio(
    grad, y, bias, ratio, out, sums, n, size, share, grad_n, grad_k, y_n, y_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    columns = column[None, :]
    factor = tl.load(ratio + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    added = tl.zeros((1, COLUMNS), tl.float32)
    if BIAS:
        added = tl.load(bias + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((COLUMNS,), tl.float32)
    first = tl.program_id(1).to(tl.int64) * share
    for start in range(0, share, ROWS):
        rows = (first + start + tl.arange(0, ROWS))[:, None]
        inside = (rows < n) & (columns < size)
        g = tl.load(grad + rows * grad_n + columns * grad_k, mask=inside, other=0.0).to(tl.float32)
        answer = tl.load(y + rows * y_n + columns * y_k, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(g * (answer - added), 0)
        tl.store(out + rows * size + columns, (g * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(1).to(tl.int64) * size + column, total, mask=column < size)


def factor(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor as it is: the kernels cast what they load."""
    return matrix


def project(x: Tensor, R: Tensor, core: Middle | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return t = scale * x R^T and t C^T; a diagonal core, of all rows or one for each, is part of the kernel."""
    (n, size), rank = x.shape, R.shape[0]
    diagonal = None if core is None else core.diagonal
    t = x.new_empty(n, rank)
    u = t if diagonal is None else x.new_empty(n, rank)
    if diagonal is not None:
        diagonal = diagonal.contiguous()
    # with few rows, more programs of fewer rows each: there is one for a block of rows, and a GPU has a hundred places
    rows = 64 if n >= 8192 else 32
    with torch.cuda.device_of(x):
        _project[(blocks(n, rows),)](
            x, R, diagonal, t, u, n, size, rank, scale, *x.stride(), *R.stride(),
            0 if diagonal is None or diagonal.dim() == 1 else rank,
            ROWS=rows, COLUMNS=64, RANK=_padded(rank), CORE=diagonal is not None, PRECISION=_precision(),
            num_stages=2,
        )  # fmt: skip
    return t, u if core is None or diagonal is not None else core.apply(t)


def add(
    y: Tensor, u: Tensor, L: Tensor, scale: float = 1.0, ratio: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return y, which becomes ratio * (y + scale * u L^T) + bias in one pass."""
    (n, size), rank = y.shape, L.shape[1]
    ratio, bias = (None if s is None else s.contiguous() for s in (ratio, bias))
    with torch.cuda.device_of(y):
        _add[(blocks(n, 64), blocks(size, 128))](
            y, u, L, ratio, bias, n, size, rank, scale, *y.stride(), *u.stride(), *L.stride(),
            ROWS=64, COLUMNS=128, RANK=_padded(rank), RATIO=ratio is not None, BIAS=bias is not None,
            PRECISION=_precision(), num_warps=8,
        )  # fmt: skip
    return y


def over_rows(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale * a^T b in float32; the wider of the two is read once."""
    wide, thin = (a, b) if a.shape[1] >= b.shape[1] else (b, a)
    (n, size), rank = wide.shape, thin.shape[1]
    across = blocks(size, 64)
    splits, share = parts(n, 64, across)
    out = a.new_empty(splits, a.shape[1], b.shape[1], dtype=torch.float32)
    of_a, of_b = out.stride()[1:]
    with torch.cuda.device_of(a):
        _over_rows[(across, splits)](
            wide, thin, out, n, size, rank, scale, share, *wide.stride(), *thin.stride(),
            out.stride(0), *((of_a, of_b) if wide is a else (of_b, of_a)),
            ROWS=64, COLUMNS=64, RANK=_padded(rank), PRECISION=_precision(), num_stages=2,
        )  # fmt: skip
    return out.sum(0) if splits > 1 else out[0]


def through_ratio(grad: Tensor, y: Tensor | None, bias: Tensor | None, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of y before its ratio, and of the ratio if y, the answer, is given, in one pass."""
    if y is None:
        return grad * ratio.to(grad.dtype), None
    n, size = grad.shape
    factors = ratio.contiguous()
    bias = None if bias is None else bias.contiguous()
    across = blocks(size, 128)
    splits, share = parts(n, 16, across)
    out = grad.new_empty(n, size)
    sums = grad.new_empty(splits, size, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _through_ratio[(across, splits)](
            grad, y, bias, factors, out, sums, n, size, share, *grad.stride(), *y.stride(),
            ROWS=16, COLUMNS=128, BIAS=bias is not None,
        )  # fmt: skip
    return out, sums.sum(0).to(ratio.dtype) / ratio


def _padded(rank: int) -> int:
    """Return the side of a tile that holds the rank: tensor cores multiply 16 at a time."""
    return max(16, 1 << (rank - 1).bit_length())


def _precision() -> str:
    if INTERPRETED:
        return "interpreted"
    return "ieee" if float32_is_exact() else "tf32"


def agrees(device: torch.device) -> bool:
    """Whether every kernel here runs on a device and answers what PyTorch does, on a small case."""
    x, W, y = (torch.linspace(-1, 1, 20 * k, device=device).sin().reshape(20, k) for k in (40, 3, 70))
    A, B = (torch.linspace(-1, 1, 3 * k, device=device).reshape(3, k) for k in (40, 70))
    d, b = torch.arange(1.0, 4, device=device), torch.linspace(-1, 1, 70, device=device)
    exact = (
        *(0.5 * x @ A.mT, 0.5 * x @ A.mT * d, (b + 2) * (y + 0.5 * W @ B) + b),
        *(0.5 * x.mT @ W, y * (b + 2), (y * (y + 1 - b)).sum(0) / (b + 2)),
    )
    for dtype in (torch.float32, torch.bfloat16):
        x, W, y = x.to(dtype), W.to(dtype), y.to(dtype)
        scaled = through_ratio(y, y + 1, b, b + 2)
        ours: tuple[Any, ...] = (
            *project(x, A, cast(Any, SimpleNamespace(diagonal=d)), 0.5),
            add(y.clone(), W, B.mT, 0.5, b + 2, b),
            over_rows(x, W, 0.5),
            *scaled,
        )
        if not all(torch.allclose(a.float(), e, rtol=0.05, atol=0.05) for a, e in zip(ours, exact, strict=True)):
            return False
    return True

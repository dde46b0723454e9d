"""The products that autograd would do wastefully: banded and sparse cores, with gradients of their own.

Each is written in plain PyTorch; on a GPU a kernel of `spectune.layers.kernels` takes the place of a banded one.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.layers.kernels import kernels
from spectune.speed.autograd import Context
from spectune.speed.dense import linear, matmul
from spectune.speed.pieces import counted, pieces

_DENSE = 100  # places of a sparse core for each entry, up to which a product with all of them is faster
_FEW = 16  # rows, for which a band's blocks take longer to be filled than its entries to be multiplied one by one
_SEVERAL = 64  # rows, up to which a sparse core is faster as it is than as a matrix of all places
_LARGE = 1 << 22  # places, of which there are too many to be filled for each product
_CHUNK = 1 << 18  # elements gathered at once by the sparse core's gradient: 1 MiB of float32
_FAR = 1 << 7  # times as many of the last two on an accelerator, where each call costs more and each number less


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


@cache  # for each device, or every product would wait for a copy
def _band_blocks(size: int, width: int, transpose: bool, device: torch.device) -> tuple[int, int, Tensor, Tensor]:
    """Return a band's block size b, its reach w, each block entry's place in `values`, and each value's in the blocks.

    Row i of the product needs columns i - w to i + w: block n, (b x (b + 2 w)), holds rows n b to n b + b of the core
    against columns n b - w to n b + b + w.  What lies outside the band, or outside the core, has the place `entries`.
    """
    width = min(width, size - 1)
    # blocks as wide as the band do twice the work of the band itself; smaller ones are too small for a product to be
    # fast
    block = min(size, max(32, width))
    count = -(-size // block)
    rows, columns = band_indices(size, width)
    if transpose:
        rows, columns = columns, rows
    # the last place stands for zero: values are padded by one, so that one gather fills the blocks, edges included
    places = torch.full((count, block, block + 2 * width), len(rows))
    # row i is row i % b of block i // b, whose first column is i // b * b - w: i (b + 2 w) + j + w - i // b * b in all
    slots = rows * places.shape[2] + columns + width - rows // block * block
    places.view(-1)[slots] = torch.arange(len(rows))
    return block, width, places.to(device), slots.to(device)


@cache
def _band_rows(size: int, width: int, transpose: bool, device: torch.device) -> Tensor:
    """Return where each row's entries are in `values`, (size x (2 w + 1)), and `entries` for those outside the core."""
    reach = min(width, size - 1)
    rows, columns = band_indices(size, width)
    if transpose:
        rows, columns = columns, rows
    places = torch.full((size, 2 * reach + 1), len(rows))
    places[rows, columns - rows + reach] = torch.arange(len(rows))
    return places.to(device)


def _windows(t: Tensor, block: int, width: int, count: int) -> Tensor:
    """Return the columns that each block of a band meets, (..., count, n, block + 2 width)."""
    # windows overlap by 2 w: views of one padded copy
    padded = F.pad(t, (width, width + count * block - t.shape[-1]))
    return padded.unfold(-1, block + 2 * width, block).movedim(-2, -3)


def _banded_kernels(width: int, *tensors: Tensor) -> ModuleType | None:
    banded = kernels("banded", *tensors)
    return banded if banded is not None and width <= banded.WIDEST else None


@torch.library.custom_op("spectune::banded_product", mutates_args=())
def banded_product(t: Tensor, values: Tensor, width: int, transpose: bool) -> Tensor:
    """Multiply by a banded core: t C^T, or t C if `transpose`, as one batched product of small blocks.

    An operator of its own, because torch.compile does not see through the cached places of the blocks.

    Args:
        t: (n, size), or (batch, n, size).
        values: (entries), or (batch, entries).
        width: entries are those with |i - j| <= width.
        transpose: multiply by C instead of its transpose.
    """
    if (banded := _banded_kernels(width, t, values)) is not None:
        return banded.product(t, values, width, transpose)
    if values.dim() == 1 and t.numel() <= _FEW * t.shape[-1]:
        reach, wide = min(width, t.shape[-1] - 1), torch.promote_types(t.dtype, torch.float32)
        # entry by entry each product would be rounded to 16 bits before it is added, which those of a matrix product
        # are not
        entries = F.pad(values.to(wide), (0, 1)).take(_band_rows(t.shape[-1], width, transpose, t.device))
        return (F.pad(t.to(wide), (reach, reach)).unfold(-1, 2 * reach + 1, 1) * entries).sum(-1).to(t.dtype)
    block, reach, places, _ = _band_blocks(t.shape[-1], width, transpose, t.device)
    blocks = F.pad(values, (0, 1))[..., places]
    # contiguous at the end, as the fake below says: torch.compile believes the fake, and would read the strides of
    # another tensor
    out = torch.matmul(_windows(t, block, reach, len(places)), blocks.mT)
    return out.movedim(-3, -2).flatten(-2)[..., : t.shape[-1]].contiguous()


@banded_product.register_fake
def _(t: Tensor, values: Tensor, width: int, transpose: bool) -> Tensor:
    return t.new_empty(t.shape)


@torch.library.custom_op("spectune::banded_entries", mutates_args=())
def banded_entries(grad: Tensor, t: Tensor, width: int, transpose: bool) -> Tensor:
    """Return the gradient of `banded_product` with respect to its values, (entries) or (batch, entries)."""
    if (banded := _banded_kernels(width, grad, t)) is not None:
        return banded.entries(grad, t, width, transpose, band_entries(t.shape[-1], width))
    block, reach, places, slots = _band_blocks(t.shape[-1], width, transpose, t.device)
    rows = F.pad(grad, (0, len(places) * block - t.shape[-1])).unflatten(-1, (len(places), block)).movedim(-2, -3)
    blocks = torch.matmul(rows.mT, _windows(t, block, reach, len(places)))
    return blocks.flatten(-3)[..., slots]


@banded_entries.register_fake
def _(grad: Tensor, t: Tensor, width: int, transpose: bool) -> Tensor:
    return t.new_empty(*t.shape[:-2], band_entries(t.shape[-1], width))


class _BandedContext(Context):
    width: int
    transpose: bool


def _save_banded(ctx: _BandedContext, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    t, values, ctx.width, ctx.transpose = inputs
    ctx.save_for_backward(t, values)


def _banded_backward(ctx: _BandedContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    t, values = ctx.saved_tensors
    to_t = banded_product(grad, values, ctx.width, not ctx.transpose) if ctx.needs_input_grad[0] else None
    to_values = banded_entries(grad, t, ctx.width, ctx.transpose) if ctx.needs_input_grad[1] else None
    return to_t, to_values, None, None


def _banded_entries_backward(ctx: _BandedContext, of_values: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    grad, t = ctx.saved_tensors
    to_grad = banded_product(t, of_values, ctx.width, ctx.transpose) if ctx.needs_input_grad[0] else None
    to_t = banded_product(grad, of_values, ctx.width, not ctx.transpose) if ctx.needs_input_grad[1] else None
    return to_grad, to_t, None, None


# both are linear in each of their operands, so that the gradient of either is the other: any order of derivative
# comes of these two
banded_product.register_autograd(_banded_backward, setup_context=_save_banded)
banded_entries.register_autograd(_banded_entries_backward, setup_context=_save_banded)


@torch.library.custom_op("spectune::sparse_product", mutates_args=())
def sparse_product(t: Tensor, values: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Multiply by a sparse core: out[..., to] += values * t[..., of].

    An operator of its own, because torch.compile does not trace sparse tensors.

    Args:
        t: (..., size).
        values, to, of: (entries): the entries, the output index and the input index of each.
    """
    rows, square = t.reshape(-1, t.shape[-1]), (t.shape[-1],) * 2
    several = len(rows) <= _SEVERAL and t.device.type == "cpu"
    if several and _has_rows() and bool((to[1:] >= to[:-1]).all()):  # as methods list entries, row by row
        wide = torch.promote_types(t.dtype, torch.float32)
        starts = torch.ops.aten._convert_indices_from_coo_to_csr(to, square[0])
        matrix = torch.sparse_csr_tensor(starts, of, values.to(wide), square, check_invariants=False)
        with torch.autocast("cpu", enabled=False):  # which would have it in 16 bits, and there is no such product
            product = matrix @ rows.mT.to(wide)
        return product.mT.reshape(t.shape).to(t.dtype).contiguous()
    if _fills(values, t):
        # a place that is listed twice counts twice, as it does in a sparse tensor
        matrix = values.new_zeros(square).index_put_((to, of), values, accumulate=True)
        return linear(rows, matrix).reshape(t.shape)
    if t.device.type != "cpu":  # cuSPARSE is called by PyTorch for 32 and 64 bits only
        values, rows = (s.to(torch.promote_types(s.dtype, torch.float32)) for s in (values, rows))
    matrix = torch.sparse_coo_tensor(torch.stack([to, of]), values, square, check_invariants=False)
    return torch.sparse.mm(matrix, rows.mT).mT.reshape(t.shape).to(t.dtype).contiguous()


@cache
def _has_rows() -> bool:
    """Whether this PyTorch multiplies sparse matrices that lie row by row; it says once that it is new to them."""
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")
        one = torch.ones(1)
        try:
            torch.matmul(torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), one, (1, 1)), one[:, None])
        except RuntimeError:  # as builds without MKL may
            return False
    return True


def _fills(entries: Tensor, t: Tensor) -> bool:
    """Whether a core (size x size) has so many entries that a product with all of its places is the faster."""
    places = t.shape[-1] ** 2
    near = t.device.type in ("cpu", "meta")
    return places <= (min(_LARGE, _DENSE * len(entries)) if near else _LARGE * _FAR)


@sparse_product.register_fake
def _(t: Tensor, values: Tensor, to: Tensor, of: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _save_sparse(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sparse_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    t, values, to, of = ctx.saved_tensors
    to_t = sparse_product(grad, values, of, to) if ctx.needs_input_grad[0] else None
    to_values = sparse_entries(grad, t, to, of) if ctx.needs_input_grad[1] else None
    return to_t, to_values, None, None


def sparse_entries(grad: Tensor, t: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Return sum over rows of grad[..., to] * t[..., of], (entries), of many places a piece of them at a time."""
    g, s = grad.reshape(-1, t.shape[-1]).mT, t.reshape(-1, t.shape[-1]).mT
    if _fills(to, t):
        return matmul(g, s.mT)[to, of]
    held = _CHUNK if t.device.type in ("cpu", "meta") else _CHUNK * _FAR
    step = max(1, held // max(1, s.shape[1]))
    found = torch.cat([(g[to[some]] * s[of[some]]).sum(-1) for some in pieces(len(to), step)])
    return found if counted.get() is None else found.new_empty(len(to))


sparse_product.register_autograd(_sparse_backward, setup_context=_save_sparse)

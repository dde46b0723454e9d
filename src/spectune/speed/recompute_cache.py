"""Activation checkpointing that keeps the products of linear layers, and computes again what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from spectune.speed.autograd import Context
from spectune.speed.dense import linear, matmul

T = TypeVar("T")
_Args = tuple[Tensor, ...]  # of functions of torch, as far as they are looked at


def keep_products() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """Return the contexts of a region's two passes, for `context_fn` of torch.utils.checkpoint.

    The first pass keeps what linear layers with a frozen weight answer, adapted or not, and the attention of packed
    rows; the second one takes it from there, and computes norms and activations again, up to the last bit.

        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": spectune.keep_products})
    """
    cache = RecomputeCache()
    return _Region(cache, again=False), _Region(cache, again=True)


class RecomputeCache:
    """What the linear layers of a checkpointed region found, in the order of their calls.

    The last product is not held, since a second pass mostly ends with it and nobody looks at it; it is taken again
    only where something is done with it after all.
    """

    def __init__(self) -> None:
        self._results: list[_Found | None] = []  # None once given back
        self._next: int | None = None  # the call that comes next in a second pass
        self._last: tuple[int, ...] = ()  # the shape of the last product's rows, if it may be let go
        self._pending: tuple[Tensor, Callable[[], Tensor]] | None = None

    def begin(self, again: bool) -> None:
        """Begin the first pass, or a second one."""
        self._next = 0 if again else None

    def end(self) -> None:
        """End a pass."""
        self._pending = None
        if self._next is None:
            last = self._results[-1] if self._results else None
            # of the first product of a kind of region nobody knows yet whether something comes behind it; once that was
            # seen, products of that kind are held from then on
            if last is not None and self._last and self._kind() not in _looked_at:
                self._results[-1] = (None, *last[0][1:]), last[1]
            self._results = _in_one_piece(self._results)

    def _kind(self) -> tuple[int, ...]:
        return (len(self._results), *self._last)

    def recall(self) -> tuple[Tensor | None, ...] | None:
        """Return the results of this call in the first pass; None in the first pass, and where they are gone.

        The product, which is the first of them, is missing from the last: see `again`.
        """
        if self._next is None:
            return None
        self.materialize()
        index, self._next = self._next, self._next + 1
        # a second pass that goes another way than the first, as one that looks at the data may, computes what it does
        # not find
        if index >= len(self._results):
            return None
        # given back at once, so that the memory of a block shrinks as its backward pass goes on
        found, self._results[index] = self._results[index], None
        return None if found is None or _changed(found) else found[0]

    def recall_whole(self) -> tuple[Tensor, ...] | None:
        """Return `recall()` where the layer looks at its product in the backward pass, so that nothing is missing."""
        return cast("tuple[Tensor, ...] | None", self.recall())

    def keep(self, *results: Tensor, looked_at: bool = False) -> None:
        """Keep the results of a call, in the first pass.

        Args:
            results: the first is the layer's product.
            looked_at: whether the layer itself looks at its product in the backward pass.
        """
        if self._next is None:
            # what changes it in place afterwards, as ReLU(inplace=True) does, shows in its version: it is then computed
            # again
            kept = tuple(result.detach() for result in results)  # without the graph, which holds this
            self._results.append((kept, tuple(result._version for result in kept)))
            self._last = () if looked_at else tuple(results[0].shape[1:])

    def hold_last(self) -> None:
        """Hold the last product after all: something is done with it where no second pass could see to it."""
        self._last = ()

    def again(self, size: int, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the last product, or an empty tensor which becomes it when it is looked at.

        Args:
            size: of the product's rows.
            x: what it is made of.
            make: () -> the product.
        """
        if self._kind() in _looked_at:
            return make()
        # autograd wants a tensor of the right shape for the graph of the second pass, whose gradient looks at no value
        # of it
        product = x.new_empty(*x.shape[:-1], size)
        self._pending = product, make
        return product

    def materialize(self) -> None:
        """Take the product that is pending, before something is done with it."""
        if self._pending is not None:
            (product, make), self._pending = self._pending, None
            # one that was looked at once is looked at in every step: this kind of region holds its last product from
            # now on, which costs its memory and saves a product each time
            _looked_at.add(self._kind())
            with torch.no_grad():
                product.copy_(make())


_Found = tuple[tuple[Tensor | None, ...], tuple[int, ...]]  # results and their versions
# for the process and not for the model: the blocks of a model are alike, and the next step meets the same kinds
_looked_at: set[tuple[int, ...]] = set()  # kinds of regions whose last product is looked at, and held from then on
_ALIGNED = 64  # bytes, as PyTorch lays out tensors of their own: vector instructions count on it


def _changed(found: _Found) -> bool:
    return any(t is not None and t._version != version for t, version in zip(*found, strict=True))


def _in_one_piece(results: list[_Found | None]) -> list[_Found | None]:
    """Move what a processor holds into one piece, so that what it frees between them is one piece as well."""
    tensors = [t for found in results if found is not None for t in found[0] if t is not None]
    if not tensors or any(t.device.type not in ("cpu", "meta") for t in tensors):
        return results
    sizes = [-(-t.numel() * t.element_size() // _ALIGNED) * _ALIGNED for t in tensors]
    pieces = iter(torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device).split(sizes))

    # what a block frees while it runs would lie between what it keeps, in holes that the next block is too large for
    def moved(t: Tensor) -> Tensor:
        piece = next(pieces)[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        return piece.copy_(t).detach()

    held = [
        None if found is None or _changed(found) else tuple(None if t is None else moved(t) for t in found[0])
        for found in results
    ]  # their versions are one, that of the piece
    return [None if found is None else (found, tuple(0 if t is None else t._version for t in found)) for found in held]


_cache: ContextVar[RecomputeCache | None] = ContextVar("_cache", default=None)


def current_cache() -> RecomputeCache | None:
    """Return the cache of the region that runs, or None outside of any."""
    return None if torch.compiler.is_compiling() else _cache.get()


_like_learning: ContextVar[bool] = ContextVar("_like_learning", default=False)


@contextmanager
def like_learning(really: bool = True) -> Iterator[None]:
    """Within the context a pass without gradients computes what one with gradients would, to the last bit.

    It is for what is subtracted from a pass with gradients: a reference, of which the difference is to be zero where
    nothing was learned.
    """
    token = _like_learning.set(really)
    try:
        yield
    finally:
        _like_learning.reset(token)


def learns() -> bool:
    """Whether gradients are taken here, or what is computed is to be as if they were."""
    return torch.is_grad_enabled() or _like_learning.get()


class SameProducts(TorchFunctionMode):
    """Without gradients: the products that a region of `keep_products` takes in its first pass, and keeps."""

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: Sequence[type],
        args: _Args = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> T | Tensor:
        if func is F.linear and not kwargs and _is_frozen(*args):
            return linear(*args)
        return func(*args, **(kwargs or {}))


class _Region(TorchFunctionMode):
    def __init__(self, cache: RecomputeCache, again: bool) -> None:
        super().__init__()
        self._cache, self._again = cache, again

    def __enter__(self) -> TorchFunctionMode:
        self._cache.begin(self._again)
        self._token = _cache.set(self._cache)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _cache.reset(self._token)
        self._cache.end()

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: Sequence[type],
        args: _Args = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> T | Tensor:
        # any function may be the one that looks at the product
        self._cache.materialize()
        if func is F.linear and not kwargs and _is_frozen(*args):
            return _Frozen.apply(*args[:2], args[2] if len(args) > 2 else None, self._cache)
        return func(*args, **(kwargs or {}))


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, with a gradient for x alone; a region keeps it."""
    return _Frozen.apply(x, weight, bias, current_cache())


def _is_frozen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not learns() or trains or weight.dtype != x.dtype:
        return False
    # under autocast the product is in another dtype than its operands, which only autograd's own node knows
    return x.is_meta or not torch.is_autocast_enabled(x.device.type)  # which does not know the meta device


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, cache: RecomputeCache | None) -> Tensor:
        # not x: the gradient of a frozen layer needs W alone, which is there anyway
        ctx.save_for_backward(weight)
        if cache is None:
            return linear(x, weight, bias)
        known = cache.recall()
        y = known[0] if known is not None else linear(x, weight, bias)
        if y is None:
            return cache.again(len(weight), x, lambda: linear(x, weight, bias))
        cache.keep(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return matmul(grads[0], weight), None, None, None

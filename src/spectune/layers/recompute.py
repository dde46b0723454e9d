"""Activation checkpointing that keeps the products of linear layers, and computes again what lies between them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def keep_products() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """Return the contexts of a region's two passes, for `context_fn` of torch.utils.checkpoint.

    The first pass keeps what linear layers with a frozen weight answer, adapted or not; the second one takes it from
    there, and computes norms, activations and attention again, up to the last bit.

        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": spectune.keep_products})
    """
    tape = Tape()
    return _Region(tape, again=False), _Region(tape, again=True)


class Tape:
    """What the linear layers of a checkpointed region found, in the order of their calls."""

    def __init__(self) -> None:
        self._results: list[
            tuple[tuple[Tensor, ...], tuple[int, ...]] | None
        ] = []  # with versions; None once given back
        self._next: int | None = None  # the call that comes next in a second pass

    def begin(self, again: bool) -> None:
        """Begin the first pass, or a second one."""
        self._next = 0 if again else None

    def recall(self) -> tuple[Tensor, ...] | None:
        """Return the results of this call in the first pass; None in the first pass, and where they are gone."""
        if self._next is None:
            return None
        index, self._next = self._next, self._next + 1
        if index >= len(self._results):
            return None
        found, self._results[index] = self._results[index], None
        if found is None or any(t._version != version for t, version in zip(*found, strict=True)):
            return None
        return found[0]

    def keep(self, *results: Tensor) -> None:
        """Keep the results of a call, in the first pass."""
        if self._next is None:
            kept = tuple(result.detach() for result in results)  # or they would hold their graph, which holds this
            self._results.append((kept, tuple(result._version for result in kept)))


_tape: ContextVar[Tape | None] = ContextVar("_tape", default=None)


def current_tape() -> Tape | None:
    """Return the tape of the region that runs, or None outside of any."""
    return None if torch.compiler.is_compiling() else _tape.get()


class _Region(TorchFunctionMode):
    def __init__(self, tape: Tape, again: bool) -> None:
        super().__init__()
        self._tape, self._again = tape, again

    def __enter__(self) -> Any:
        self._tape.begin(self._again)
        self._token = _tape.set(self._tape)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        _tape.reset(self._token)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _is_frozen(*args):
            return _Frozen.apply(*args[:2], args[2] if len(args) > 2 else None, self._tape)
        return func(*args, **(kwargs or {}))


def _is_frozen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    learns = x.requires_grad and torch.is_grad_enabled()
    if not learns or trains or weight.dtype != x.dtype:
        return False
    return x.is_meta or not torch.is_autocast_enabled(x.device.type)  # which does not know the meta device


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tape: Tape) -> Tensor:
        ctx.save_for_backward(weight)
        known = tape.recall()
        if known is not None:
            return known[0]
        y = F.linear(x, weight, bias)
        tape.keep(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight, None, None, None

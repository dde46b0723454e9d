"""The cross-entropy of a language model's next tokens, without the logits of all positions in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spectune.speed.autograd import Context
from spectune.speed.dense import linear, matmul
from spectune.speed.pieces import pieces
from spectune.speed.shapes import IGNORE, STEP, switched_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD = 24 << 20  # bytes of logits at once
_BLOCK = 3 << 17  # logits in float32 at once, so that a processor's cache holds them
_FAR = 5, 32  # times as many of both on an accelerator
_OWN_LOGITS: WeakSet[nn.Module] = WeakSet()  # models found to change the product before they return it


def cross_entropy_sum(model: PreTrainedModel, inputs: Mapping[str, object], labels: Tensor) -> Tensor:
    """Return the sum over positions of -log p(label).

    Where the output embedding is frozen and the model returns its product as it is, logits are made, and their gradient
    taken, a few positions at a time; only the gradient of the hidden states is kept.  On a GPU cut_cross_entropy, or
    else liger_kernel, does that where it is installed.  Elsewhere (soft-capped or scaled logits, an adapter or a shard
    in that place) the model's own logits are used.

    Args:
        model: a causal language model.
        inputs: to the model.
        labels: of the positions of its logits, -100 where there is none.
    """
    targets = labels.flatten()
    hidden = _hidden(model, inputs)
    if isinstance(hidden, Tensor):
        wanted = targets != IGNORE
        head = cast(nn.Linear, model.get_output_embeddings())
        return _summed(hidden.flatten(0, -2)[wanted], head.weight, targets[wanted])
    logits = model(**inputs, use_cache=False).logits.float().flatten(0, -2)
    return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE, reduction="sum")


def _hidden(model: PreTrainedModel, inputs: Mapping[str, object]) -> Tensor | None:
    """Return what the model multiplies by its output embedding, or None where that product is not its answer."""
    head: object = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return None
    if head.weight.requires_grad or type(head.weight) is not nn.Parameter:
        return None
    if model in _OWN_LOGITS or torch.compiler.is_compiling():
        return None
    # the model runs to its end without its largest product: its logits are then the hidden states, if it does nothing
    # more with them, which the mark of a view tells (a scaled or capped tensor is another one)
    vars(head)["forward"] = _unchanged
    try:
        outputs = model(**inputs, use_cache=False)
    finally:
        del vars(head)["forward"]
    if getattr(outputs.logits, "_spectune_hidden", False):
        return outputs.logits
    # one pass is lost on it, once: it is asked no more
    _OWN_LOGITS.add(model)
    return None


def _unchanged(hidden: Tensor) -> Tensor:
    """Take the place of the output embedding, and mark what passes so that any change by the model shows."""
    marked = hidden.view(hidden.shape)
    vars(marked)["_spectune_hidden"] = True
    return marked


def _summed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log p(target) for hidden states (n x size) and a frozen weight (words x size)."""
    if len(hidden) and hidden.dtype == weight.dtype and _takes_kernels(hidden):
        half = hidden.dtype in (torch.bfloat16, torch.float16)  # all that cut_cross_entropy differentiates
        if half and (cut := _installed("cut_cross_entropy", "linear_cross_entropy")):
            return cut(hidden, weight, targets, reduction="sum")
        if liger := _installed("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"):
            return liger(hidden, weight, targets, reduction="sum")
    return _Chunked.apply(hidden, weight, targets)


def _takes_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda and not switched_off() and torch.cuda.get_device_capability(hidden.device) >= (8, 0)


@cache
def _installed(module: str, name: str) -> Callable[..., Tensor] | None:
    """Return a function of a package, or None where it is not installed or does not load."""
    try:
        return getattr(import_module(module), name, None)
    except Exception:  # whatever a broken installation raises
        return None


class _ChunkedContext(Context):
    grad: Tensor | None


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ChunkedContext, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        learns = ctx.needs_input_grad[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if learns else None
        near = hidden.device.type in ("cpu", "meta")
        held, block = (_HELD, _BLOCK) if near else (_HELD * _FAR[0], _BLOCK * _FAR[1])
        step = _even(len(hidden), held // (len(weight) * hidden.element_size()))
        at_once = max(1, block // len(weight))
        for rows in pieces(len(hidden), step):
            part, target = hidden[rows], targets[rows, None]
            count = len(part)
            # oneDNN makes a kernel for each number of rows it meets: few different ones, or the first epochs are
            # compilation
            logits = linear(F.pad(part, (0, 0, 0, -count % STEP)), weight)
            for few in pieces(count, at_once):
                total += _to_gradient(logits[few], target[few])
            # the gradient with respect to the hidden states, before it is known what the loss is multiplied by: that is
            # one number, and the logits need not be there a second time
            if grad is not None:
                grad[rows] = matmul(logits, weight)[:count]
        ctx.grad = grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: _ChunkedContext, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        assert ctx.grad is not None  # hidden states that take no gradient have no backward pass
        return ctx.grad * grads[0].to(ctx.grad.dtype), None, None


def _even(count: int, most: int) -> int:
    """Return how many of `count` rows to take at once: a multiple of STEP, up to `most`, and as many each time."""
    most = max(STEP, most - most % STEP)
    even = -(-count // max(1, -(-count // most)))
    return max(STEP, even + -even % STEP)


def _to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log p(target), and leave its gradient in the place of the logits (n x words)."""
    exact = logits.float()
    p = exact.softmax(1)
    log_sums = exact.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
    loss = (log_sums - exact.gather(1, targets)).sum()
    logits.copy_(p.scatter_add_(1, targets, torch.full_like(log_sums, -1.0)))
    return loss

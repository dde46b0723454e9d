"""Root-mean-square norms of a frozen model with their gradient in one piece, at a fifth of what autograd takes.

A model's own norm is a chain of small operations, and autograd's gradient one of fifteen more, each over all of the
hidden states in fp32; of an input in 16 bits they keep copies in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spectune.private import unseen
from spectune.speed.autograd import Context
from spectune.speed.forwards import exchanged_forwards
from spectune.speed.recompute_cache import current_cache


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Within the context the norms of a model take their gradient in one piece.

    That goes for those whose own answer is, to the last bit, the one of a known formula, and while they are frozen.
    """
    formulas = {module: formula for module in model.modules() if (formula := _formula(module)) is not None}
    with exchanged_forwards({module: _Forward(module, formula) for module, formula in formulas.items()}):
        yield


class _Norm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, early: bool) -> Tensor:
        exact = x.float()
        inverse = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        normed = exact * inverse
        ctx.save_for_backward(x, weight, inverse)
        return weight * normed.to(x.dtype) if early else (weight * normed).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad, exact = (grads[0] * weight).float(), x.float()
        # the gradient is g / r - x (g . x) / (n r^3), r the root mean square; nothing of the input's size is kept but x
        # itself
        along = (grad * exact).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(exact, along).to(x.dtype), None, None, None


class _Formula(NamedTuple):
    """How a norm is computed.

    Args:
        eps: what is added to the mean square.
        early: whether it is cast to the input's dtype before the weight.
        plus: what is added to the weight.
    """

    eps: float
    early: bool
    plus: float

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = weight.detach() if self.early else weight.detach().float() + self.plus
        return _Norm.apply(x, scale, self.eps, self.early)


_KNOWN = (True, 0.0), (False, 0.0), (False, 1.0)  # Llama's, OLMo 2's, Gemma's


class _Forward:
    """Takes the place of a norm's forward method."""

    def __init__(self, module: nn.Module, formula: _Formula) -> None:
        self._module, self._formula, self._kind = module, formula, type(module)

    def __call__(self, *args: Tensor, **kwargs: object) -> Tensor:
        weight = self._module._parameters.get("weight")
        alone = len(args) == 1 and not kwargs  # without a gate, which some norms take beside the input
        if not alone or weight is None or not self._applies(args[0], weight):
            return type(self._module).forward(self._module, *args, **kwargs)
        if (cache := current_cache()) is not None:
            cache.materialize()
        with unseen():
            return self._formula(args[0], weight)

    def _applies(self, x: Tensor, weight: nn.Parameter) -> bool:
        if type(self._module) is not self._kind:  # it was adapted since, and trains a weight of its own
            return False
        learns = x.requires_grad and torch.is_grad_enabled() and not weight.requires_grad
        return learns and type(weight) is nn.Parameter and weight.dtype == x.dtype and not torch.compiler.is_compiling()


def _formula(module: nn.Module) -> _Formula | None:
    """Return the formula that a norm follows, or None for anything else."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not alone or weight is None or weight.dim() != 1 or not isinstance(eps, float) or "forward" in vars(module):
        return None
    sample = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    # whatever the class is called: a norm is known by its answer, and one that deviates in a bit stays as it is
    x, drawn = torch.randn(3, len(weight), generator=generator, device="cpu").to(weight.dtype).split([2, 1])
    with torch.no_grad():
        own = sample.get_parameter("weight")
        own.copy_(drawn[0])
        try:
            answer = type(module).forward(sample, x)  # without hooks
        except Exception:  # whatever takes other inputs than a norm does
            return None
    found = (_Formula(eps, *known) for known in _KNOWN)
    return next((formula for formula in found if _equal(formula(x, own), answer)), None)


def _equal(ours: Tensor, answer: object) -> bool:
    return isinstance(answer, Tensor) and ours.dtype == answer.dtype and torch.equal(ours, answer)

"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353), around any additive method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.factors import Base, Factors
from spectune.methods.base import Method, Shapes, Tensors
from spectune.methods.lora import LoRA
from spectune.methods.registry import register
from spectune.spectral import Request

_ROWS = 256  # rows of L C held at once while the norm is computed


@register
@dataclass(frozen=True)
class DoRA(Method):
    """Train a magnitude for each output row: W' = m * (W + dW) / ||W + dW||, dW = s L C R of the inner method.

    m (out) starts at ||W_i||, and the norm is detached from the gradient.  Nothing out x in is built:
    ||W_i + s (L C)_i R||^2 = ||W_i||^2 + 2 s (L C)_i . (W R^T)_i + s^2 (L C)_i (R R^T) (L C)_i^T.

    Args:
        inner: the additive method inside.

    Raises:
        SpectuneError: `inner` is not an additive method.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "arXiv:2402.09353"
    summary: ClassVar[str] = "m (W + dW) / ||W + dW|| around an additive method; m and the method train"
    learning_rate: ClassVar[float] = 2e-4
    additive: ClassVar[bool] = False

    inner: Method = field(default_factory=lambda: LoRA(rank=16, alpha=32))

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method) or not self.inner.additive:
            raise SpectuneError(f"inner of DoRA must be an additive method such as LoRA(), not {self.inner!r}")

    @property
    def basis_key(self) -> str:
        return f"dora-{self.inner.basis_key}"

    def shapes(self, out: int, into: int) -> Shapes:
        return {"magnitude": (out,), **self.inner.shapes(out, into)}

    def request(self) -> Request | None:
        return self.inner.request()

    def basis(self, weight: Tensor, decomposition: Any) -> dict[str, Tensor]:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return {"norms": norms, **self.inner.basis(weight, decomposition)}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        inner = {name: shape for name, shape in shapes.items() if name != "magnitude"}
        return {"magnitude": basis["norms"].clone(), **self.inner.initial(inner, basis)}

    def check(self, out: int, into: int) -> str | None:
        return self.inner.check(out, into)

    def start_schedule(self, updates: Sequence[Any]) -> None:
        self.inner.start_schedule(updates)

    def factors(self, t: Tensors) -> Factors:
        return self.inner.factors(t)

    @torch.no_grad()
    def _norms(self, t: Tensors, f: Factors, base: Base) -> Tensor:
        known = self.inner.projections(t)
        if known is None:
            g, h = base.project(f.right).to(f.left.dtype), f.right @ f.right.mT
        else:
            g, h = known
        squared = []
        for start in range(0, f.left.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            left = f.left[rows].to(t["norms"].dtype)
            p = f.core.transposed(left)
            cross = left * g if known else g[:, rows].mT
            square = p * h if known else p @ h
            squared.append((p * (2 * f.scale * cross + f.scale**2 * square)).sum(1))
        return (t["norms"] ** 2 + torch.cat(squared)).clamp_min(0).sqrt()

    def _ratio(self, t: Tensors, f: Factors, base: Base) -> Tensor:
        norms = self._norms(t, f, base)
        return torch.where(norms > 0, t["magnitude"] / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        ratio = self._ratio(t, self.factors(t), base)
        inner = self.inner.respond(t, x, base, training)
        return (ratio - 1).to(x.dtype) * base.output() + ratio.to(x.dtype) * inner

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        updated = weight + self.inner.delta(t, weight)
        norms = torch.linalg.vector_norm(updated, dim=1)
        ratio = torch.where(norms > 0, t["magnitude"] / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)
        return ratio[:, None] * updated - weight

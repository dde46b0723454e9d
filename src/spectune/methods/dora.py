"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353), around any additive method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.factors import Base, Factors
from spectune.methods.base import Method, Shapes, Tensors
from spectune.methods.lora import LoRA
from spectune.methods.registry import register
from spectune.spectral import Request
from spectune.speed.recompute_cache import current_cache

_CHUNK = 1 << 22  # elements of L C held at once while the norm is computed: 16 MiB of float32


@register
@dataclass(frozen=True)
class DoRA(Method):
    """Train a magnitude for each output row: W' = m * (W + dW) / ||W + dW||, dW = s L C R of the inner method.

    m (out) starts at ||W_i||, and the norm is detached from the gradient.  Nothing out x in is built:
    ||W_i + s (L C)_i R||^2 = ||W_i||^2 + 2 s (L C)_i . (W R^T)_i + s^2 (L C)_i (R R^T) (L C)_i^T.  Where the inner
    method has dropout, y = W x + (m / ||W + dW|| - 1) W drop(x) + (m / ||W + dW||) dW drop(x), as the authors have it.

    Args:
        inner: the additive method inside.

    Raises:
        SpectuneError: `inner` is not an additive method.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "arXiv:2402.09353"
    summary: ClassVar[str] = "m (W + dW) / ||W + dW|| around an additive method; m and the method train"
    additive: ClassVar[bool] = False

    inner: Method = field(default_factory=lambda: LoRA(rank=16, alpha=32))

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method) or not self.inner.additive:
            raise SpectuneError(f"inner of DoRA must be an additive method such as LoRA(), not {self.inner!r}")

    @property
    def learning_rate(self) -> float:  # type: ignore[override]
        """The inner method's."""
        return self.inner.learning_rate

    @property
    def drop(self) -> float:
        return self.inner.drop

    @property
    def basis_key(self) -> str:
        return f"dora-{self.inner.basis_key}"

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"magnitude": (out_features,), **self.inner.shapes(out_features, in_features)}

    def request(self) -> Request | None:
        return self.inner.request()

    def basis(self, weight: Tensor, decomposition: Any) -> dict[str, Tensor]:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        return {"norms": norms, **self.inner.basis(weight, decomposition)}

    def spectrum(self, t: Tensors) -> Tensor | None:
        return self.inner.spectrum(t)

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        inner = {name: shape for name, shape in shapes.items() if name != "magnitude"}
        return {"magnitude": basis["norms"].clone(), **self.inner.initial(inner, basis)}

    def check(self, out_features: int, in_features: int) -> str | None:
        return self.inner.check(out_features, in_features)

    def start_schedule(self, updates: Sequence[Any]) -> None:
        self.inner.start_schedule(updates)

    def factors(self, t: Tensors) -> Factors:
        return self.inner.factors(t)

    @torch.no_grad()
    def _norms(self, t: Tensors, f: Factors, base: Base) -> Tensor:
        cache = current_cache()
        known = cache.recall() if cache is not None else None
        if known is not None:
            return known[0]
        squared = []
        with torch.autocast("cpu" if t["norms"].is_meta else t["norms"].device.type, enabled=False):
            diagonals = self.inner.projections(t)
            g, h = diagonals or (base.project(f.right).to(t["norms"].dtype), f.right @ f.right.mT)
            step = max(1, _CHUNK // f.left.shape[1])
            for left, cross in zip(f.left.split(step), repeat(g) if diagonals else g.split(step), strict=False):
                left = left.to(t["norms"].dtype)
                p = f.core.transposed(left)
                if diagonals:
                    rest = 2 * f.scale * left * cross + f.scale**2 * p * h
                else:
                    rest = torch.addmm(cross, p, h, beta=2 * f.scale, alpha=f.scale**2)
                squared.append((p * rest).sum(1))
        norms = (t["norms"] ** 2 + torch.cat(squared)).clamp_min(0).sqrt()
        if cache is not None:
            cache.keep(norms, looked_at=True)
        return norms

    def ratio(self, t: Tensors, base: Base) -> Tensor:
        norms = self._norms(t, self.factors(t), base)
        return _ratio(t["magnitude"], norms)

    def whole(self, t: Tensors) -> Factors | None:
        return self.inner.whole(t)

    def still(self, t: Tensors) -> Tensors:
        return self.inner.still(t)

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        ratio = self.ratio(t, base)
        dropped = self._dropped(x, training)
        output, x = base.output() if dropped is x else base.output(dropped), dropped
        inner = self.inner.respond(t, x, base, False)
        return (ratio - 1).to(output.dtype) * output + ratio.to(output.dtype) * inner

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        updated = weight + self.inner.delta(t, weight)
        return _ratio(t["magnitude"], torch.linalg.vector_norm(updated, dim=1))[:, None] * updated - weight


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return m / ||W + dW|| by row, and one for a row of zeros."""
    return torch.where(norms > 0, magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)

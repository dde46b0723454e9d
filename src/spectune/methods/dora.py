"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353), around any additive method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.cores import Identity
from spectune.layers.factors import Base, Factors, Ratio
from spectune.layers.kinds import Vectors
from spectune.layers.updates import Update
from spectune.methods.base import Decomposition, Method, Shapes, Tensors
from spectune.methods.lora import LoRA
from spectune.methods.registry import register
from spectune.private import is_batched
from spectune.spectral import Request
from spectune.speed.recompute_cache import current_cache

_CHUNK = 1 << 22  # elements of L C held at once while the norm is computed: 16 MiB of float32
_OTHER = 1e-4  # by which a row of another W is longer or shorter
_SMALLEST = 1e-6  # a ratio below which a product with it has no gradient to speak of


@register
@dataclass(frozen=True)
class DoRA(Method):
    """Train a magnitude for each output row: W' = m * (W + dW) / ||W + dW||, dW = s L C R of the inner method.

    m (out) starts at ||W_i||, and the norm is detached from the gradient.  Nothing out x in is built:
    ||W_i + s (L C)_i R||^2 = ||W_i||^2 + 2 s (L C)_i . (W R^T)_i + s^2 (L C)_i (R R^T) (L C)_i^T.  Where the inner
    method has dropout, y = W x + (m / ||W + dW|| - 1) W drop(x) + (m / ||W + dW||) dW drop(x), as the authors have it.

    Rows of which dW leaves so little that the sum above loses its digits are computed in float64 from W + dW itself.

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
    def learning_rate(self) -> float:
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

    def basis(self, weight: Tensor, decomposition: Decomposition) -> dict[str, Tensor]:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        if not norms.is_meta and not norms.isfinite().all():
            raise SpectuneError(
                "DoRA divides by the lengths of the weight's rows, and one is longer than float32 holds the square of "
                "(1.8e19): take another method for this layer, or repair the checkpoint"
            )
        return {"norms": norms, **self.inner.basis(weight, decomposition)}

    def spectrum(self, t: Tensors) -> Tensor | None:
        return self.inner.spectrum(t)

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        inner = {name: shape for name, shape in shapes.items() if name != "magnitude"}
        return {"magnitude": basis["norms"].clone(), **self.inner.initial(inner, basis)}

    def initial_of_table(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        inner = {name: shape for name, shape in shapes.items() if name != "magnitude"}
        return {"magnitude": basis["norms"].clone(), **self.inner.initial_of_table(inner, basis)}

    @property
    def learns_from_zero(self) -> bool:
        """As the inner method does."""
        return self.inner.learns_from_zero

    def fit(self, out_features: int, in_features: int) -> DoRA:
        inner = self.inner.fit(out_features, in_features)
        return self if inner == self.inner else replace(self, inner=inner)

    def start_schedule(self, updates: Sequence[Update]) -> None:
        self.inner.start_schedule(updates)

    def factors(self, t: Tensors) -> Factors:
        return self.inner.factors(t)

    @torch.no_grad()
    def _norms(self, t: Tensors, f: Factors, base: Base) -> tuple[Tensor, Tensor]:
        """Return ||W_i + dW_i|| and in which rows it is too little to be had so (out).

        Tensors, factors and what the base says may be those of several layers (layers x ...).
        """
        cache = current_cache()
        known = cache.recall_whole() if cache is not None else None
        if known is not None:
            return known[0], known[1]
        # of the W that is there now: who writes to W after adapting wants its norms, and not those of the basis
        of_weight = t["norms"] if base.norms is None or t["norms"].is_meta else base.norms().to(t["norms"].device)
        squared, largest, dtype = [], [], t["norms"].dtype
        with torch.autocast("cpu" if t["norms"].is_meta else t["norms"].device.type, enabled=False):
            diagonals = self.inner.projections(t) if base.owns(self.basis_key) else None
            if (values := getattr(f.core, "values", None)) is not None:
                f = f._replace(core=f.core.holding(values.to(dtype)))
            right = f.right if diagonals else f.right.to(dtype)
            g, h = diagonals or (base.project(f.right), right @ right.mT)
            # where ||W_i + dW_i||^2 is this small beside what it is a sum of, its digits are those of rounding: 2^18
            # roundings in the dtype of sums, 2^5 in that of the products. The row is then taken from W + dW itself
            lost = min(1 / 8, max(torch.finfo(dtype).eps * 2**18, torch.finfo(g.dtype).eps * 2**5))
            g, lengths = g.to(dtype), f.scale**2 * (h if diagonals else h.diagonal(dim1=-2, dim2=-1))[..., None]
            # L in the norm's dtype, a piece at a time: all of it would be one more L
            step = max(1, _CHUNK // (f.left.numel() // f.left.shape[-2]))
            pieces = f.left.split(step, -2)
            for left, cross in zip(pieces, [g] * len(pieces) if diagonals else g.split(step, -2), strict=True):
                left = left.to(dtype)
                p = f.core.transposed(left)
                if diagonals:
                    rest = 2 * f.scale * left * cross + f.scale**2 * p * h
                else:
                    add = torch.addmm if p.dim() == 2 else torch.baddbmm
                    rest = add(cross, p, h, beta=2 * f.scale, alpha=f.scale**2)
                squared.append((p * rest).sum(-1))
                largest.append((p.square() @ lengths.to(dtype))[..., 0])
        of_sum = of_weight**2 + torch.cat(squared, -1)
        terms = of_weight + torch.cat(largest, -1).sqrt()  # as long as W_i and the terms of dW_i together, end to end
        norms = of_sum.clamp_min(0).sqrt().detach()  # no_grad is nothing to differentiation forwards
        little = (of_sum < lost * terms**2) | (t["magnitude"].abs() < _SMALLEST * norms)
        if cache is not None:
            cache.keep(norms, little, looked_at=True)
        return norms, little

    def ratio(self, t: Tensors, base: Base) -> Ratio:
        f = self.factors(t)
        norms, little = self._norms(t, f, base)
        told = base.rows is not None and not little.is_meta and not torch.compiler.is_compiling()
        batched = is_batched(little)  # which rows these are differs then, and none can be asked: all of them
        if not told or not (batched or little.any()):
            return Ratio(_ratio(t["magnitude"], norms))
        rows = torch.arange(len(norms), device=norms.device) if batched else little.nonzero()[:, 0]
        sums = self._sums(t, base, rows)
        # the norm is no part of the gradient, as in the paper
        exact = torch.linalg.vector_norm(sums.detach(), dim=1).to(norms.dtype)
        return Ratio(_ratio(t["magnitude"], norms.index_copy(0, rows, exact)), rows, sums.to(norms.dtype))

    def ratios(self, ts: Sequence[Tensors], bases: Sequence[Base]) -> Tensor | None:
        factors = [self.factors(t) for t in ts]
        f = factors[0]
        thin = 4 * f.left.shape[1] <= min(f.left.shape[0], f.right.shape[1])
        if not thin or not isinstance(f.core, Identity) or any(base.norms is None for base in bases):
            return None  # factors as large as W are not laid side by side
        with torch.no_grad():
            f = f._replace(left=torch.stack([f.left for f in factors]), right=torch.stack([f.right for f in factors]))
            norms = torch.stack([base.norms() for base in bases if base.norms is not None])
        magnitude = torch.stack([t["magnitude"] for t in ts])

        def project(right: Tensor) -> Tensor:
            return torch.stack([base.project(one) for base, one in zip(bases, right, strict=True)])

        # owns nothing: projections are of one layer's singular vectors, and those of several lie side by side here
        base = bases[0]._replace(project=project, norms=lambda: norms, owns=lambda key: False)
        stacked = {"magnitude": magnitude, "norms": torch.stack([t["norms"] for t in ts])}
        norms_now, little = self._norms(stacked, f, base)
        if not little.is_meta and little.any():
            return None
        return _ratio(magnitude, norms_now)

    def _sums(self, t: Tensors, base: Base, rows: Tensor) -> Tensor:
        """Return W + dW (n x in) in some rows, as exactly as they can be had."""
        assert base.rows is not None
        f, parts = self.inner.factors(_wide(t)), []
        for index in rows.split(max(1, _CHUNK // f.right.shape[1])):
            of_update = f.scale * (f.core.transposed(f.left.index_select(0, index)) @ f.right)
            parts.append(base.rows(index).to(of_update.dtype) + of_update)
        return torch.cat(parts)

    def add(self, t: Tensors, x: Tensor, y: Tensor) -> None:
        self.inner.add(t, x, y)

    def whole(self, t: Tensors) -> Factors | None:
        return self.inner.whole(t)

    def still(self, t: Tensors) -> Tensors:
        return self.inner.still(t)

    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor:
        if torch.compiler.is_compiling() and base.rows is not None:
            return self._traced(t, self._dropped(x, training), base)
        values, rows, sums = self.ratio(t, base)
        dropped = self._dropped(x, training)
        output, x = base.output() if dropped is x else base.output(dropped), dropped
        inner = self.inner.respond(t, x, base, False)
        # those rows get their answer below: with a ratio of one they are at least finite until then
        ratio = values if rows is None else values.index_fill(0, rows, 1.0)
        y = (ratio - 1).to(output.dtype) * output + ratio.to(output.dtype) * inner
        if rows is None or sums is None:
            return y
        whole = _of_rows(x, (values[rows, None] * sums).to(x.dtype), rows)
        return y.index_copy(-1, rows, (whole - output.index_select(-1, rows)).to(y.dtype))

    def _traced(self, t: Tensors, x: Tensor, base: Base) -> Tensor:
        """Return x (W' - W)^T as torch.compile traces it: which rows are lost among digits, it cannot ask.

        So both ways are in the graph, and where a row is lost, or W is no longer the one that the inner method's
        singular vectors are of, all rows are taken from W + dW itself.
        """
        assert base.norms is not None
        norms, little = self._norms(t, self.inner.factors(t), base)
        if self.inner.projections(t) is not None:
            now = base.norms()
            little = little | ((now - t["norms"]).abs() > _OTHER * now)
        output, inner = base.output(x), self.inner.respond(t, x, base, False)
        everything = torch.arange(len(norms), device=x.device)

        def exact() -> Tensor:
            sums = self._sums(t, base, everything)
            ratio = _ratio(t["magnitude"], torch.linalg.vector_norm(sums.detach(), dim=1))
            whole = _of_rows(x, (ratio[:, None] * sums).to(x.dtype), everything)
            return (whole.to(output.dtype) - output).contiguous()

        def usual() -> Tensor:
            ratio = _ratio(t["magnitude"], norms)
            whole = (ratio - 1).to(output.dtype) * output + (ratio.to(output.dtype) * inner).to(output.dtype)
            return whole.contiguous()  # both are to have the same strides

        return torch.cond(little.any(), exact, usual)

    def delta(self, t: Tensors, weight: Tensor) -> Tensor:
        t = _wide(t)
        dense = weight.to(t["magnitude"].dtype)
        updated = dense + self.inner.delta(t, dense)
        ratio = _ratio(t["magnitude"], torch.linalg.vector_norm(updated.detach(), dim=1))
        return (ratio[:, None] * updated - dense).to(torch.promote_types(weight.dtype, torch.float32))


def _wide(t: Tensors) -> dict[str, Tensor]:
    """Return tensors in the widest dtype of their device."""
    wide = torch.float32 if t["magnitude"].device.type == "mps" else torch.float64
    return {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in t.items()}


def _of_rows(x: Tensor | Vectors, matrix: Tensor, rows: Tensor) -> Tensor:
    """Return x M^T (..., n) for M (n x in) in the place of these rows (n) of W."""
    return x.of_rows(matrix, rows) if isinstance(x, Vectors) else F.linear(x, matrix)


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return m / ||W + dW|| by row, and one for a row of zeros."""
    return torch.where(norms > 0, magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)

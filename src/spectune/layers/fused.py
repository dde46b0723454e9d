"""The whole weight W' of a layer under one choice, which answers alone as long as what it is made of stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.frozen import FrozenLayer
from spectune.layers.mixtures import Part
from spectune.layers.modules import effective_weight
from spectune.layers.selection import Scope
from spectune.layers.sources import Sources
from spectune.layers.updates import Update
from spectune.layers.values import digest, values_of
from spectune.speed.dense import PackedWeight, matmul, one_row_pays

_MANY = 64  # a rank above which the product of the factors, and not the sum, is what W' takes
_PATIENCE = 4  # passes that a change lasts before W' is made anew


class Fused:
    """W' of a layer beside W, and what it was made of.

    The parameters that it is made of are watched (`Watched`) until `end`.

    Args:
        layer: an adapted layer with a plain weight.
    """

    in_place = False

    def __init__(self, layer: FrozenLayer) -> None:
        self._layer = layer
        self._scope: Scope | None = None
        self._sources = Sources()
        self._tensors: list[Tensor] = []  # that W' is made of
        self._digests: list[Tensor | None] = []  # and what they were; None where what is written there is what answers
        self._misses = 0
        self._weight: Tensor | PackedWeight | None = None
        self._bias: Tensor | None = None

    def answer(self, scope: Scope, parts: Sequence[Part] | None, x: Tensor) -> Tensor | None:
        """Return W' x + b', or None where that is not what these parts answer, or gradients for them are needed."""
        # a weight that is a tensor may take a gradient, and be another number by the next pass
        if not parts or any(isinstance(weight, Tensor) for _, weight in parts):
            return None
        if not self._holds(scope):
            lasting = scope is self._layer.selection.scope_of_model
            # a context's choice may be gone with the next pass, and W' costs as much as tens of tokens: it is made
            # where a change lasts
            self._misses += lasting
            if not lasting or self._misses < _PATIENCE or not self.make(scope, parts):
                return None
        if self._weight is None or not self._fits(x):
            return None
        self._misses = 0
        if isinstance(self._weight, PackedWeight):
            return self._weight.linear(x, self._bias)
        return F.linear(x, self._weight, self._bias)

    def _holds(self, scope: Scope) -> bool:
        if self._scope is not scope:
            return False
        sources = self._sources
        for place in sources.changed():
            if sources.is_hidden(place) or not sources.is_same(place, but_lent=True):
                return False
            # somebody had its memory, and may have written there
            if (seen := self._digests[place]) is not None:
                if not torch.equal(digest(self._tensors[place]), seen):
                    return False
                sources.note(place)
        return True

    def _fits(self, x: Tensor) -> bool:
        if self._weight is None or x.dtype is not self._weight.dtype:
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in self._tensors)

    @torch.inference_mode(False)
    @torch.no_grad()
    def make(self, scope: Scope, parts: Sequence[Part]) -> bool:
        """Make W' of these updates with their weights; return whether every change of them can be noticed."""
        self._misses, self._scope, self._weight, self._bias = 0, scope, None, None
        if not self._watch(parts):
            return False
        made = _made(self._layer, parts)
        # W' is held once: laid out, it has to be right for one row too
        self._weight = PackedWeight(made) if PackedWeight.takes(made) and one_row_pays(made.dtype) else made
        self._bias = whole_bias(self._layer, parts)
        return True

    def _watch(self, parts: Sequence[Part]) -> bool:
        held = [(self._layer._parameters, key) for key in ("weight", "bias")]
        held += [place for update, _ in parts for place in update.places().values()]
        there = [(d, key, parameter) for d, key in held if (parameter := d.get(key)) is not None]
        sources = self._sources
        sources.cut(0)
        for place, (d, key, _) in enumerate(there):
            sources.put(place, d, key)
        if any(sources.is_hidden(place) for place in range(len(there))):
            return False
        self._tensors = [parameter for _, _, parameter in there]
        self._digests = [digest(tensor).clone() for tensor in self._tensors]
        return True

    def end(self) -> None:
        """Let everything be as it was."""
        self._sources.end()
        self._weight, self._scope = None, None

    def check_own_weight(self) -> None:
        """Raise where the layer's weight is W' and not its own."""

    def __reduce__(self) -> tuple[object, ...]:  # a copy of a layer is not fused
        self.check_own_weight()  # else W' would be its W
        return type(None), ()


class InPlace(Fused):
    """W' in the place of W: until `end`, nothing else can be answered.

    Args:
        layer: the layer.
        own: W's own bytes, elsewhere.
    """

    in_place = True

    def __init__(self, layer: FrozenLayer, own: Tensor) -> None:
        super().__init__(layer)
        self._own: Tensor | None = own

    def answer(self, scope: Scope, parts: Sequence[Part] | None, x: Tensor) -> Tensor:
        """Return W' x + b'."""
        weight = self._weight
        if parts is None or not isinstance(weight, Tensor) or not self._holds(scope) or not self._fits(x):
            raise SpectuneError(
                'the weights hold what was active when fused(where="inplace") was entered, and another choice, another '
                "dtype, gradients or changed weights were met inside of it: leave it first"
            )
        return F.linear(x, weight, self._bias)

    def check_own_weight(self) -> None:
        raise SpectuneError(
            f'{self._layer.adapted_as!r} has another weight within fused(where="inplace"): leave the context first'
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def make(self, scope: Scope, parts: Sequence[Part]) -> bool:
        """Write W' over W."""
        weight, bias = cast(Tensor, self._layer._parameters["weight"]), whole_bias(self._layer, parts)
        new = _made(self._layer, parts)
        weight.copy_(new.T if self._layer.is_transposed else new)
        if not self._watch(parts):
            return False
        self._digests = [None if t is weight else d for t, d in zip(self._tensors, self._digests, strict=True)]
        self._scope, self._weight, self._bias = scope, values_of(effective_weight(self._layer)), bias
        return True

    @torch.no_grad()
    def end(self) -> None:
        """Put W's own bytes back."""
        super().end()
        if self._own is not None:
            cast(Tensor, self._layer._parameters["weight"]).copy_(self._own)
            self._own = None


def whole_weight(layer: FrozenLayer, parts: Sequence[Part], dtype: torch.dtype | None = None) -> Tensor:
    """Return W' (out x in) of updates with their weights, in a dtype or W's, from a sum in float32 at least."""
    weight = values_of(effective_weight(layer))
    wide = torch.promote_types(weight.dtype, torch.float32)
    start = weight.to(wide)
    total = start.clone(memory_format=torch.contiguous_format)
    for update, factor in parts:
        tensors = {k: values_of(v) for k, v in layer.tensors(update).items()}
        tensors = {k: v.to(wide) if v.is_floating_point() else v for k, v in tensors.items()}
        method = update.method
        if method.additive and not method.replaces:
            f = method.factors(tensors)
            total.add_(matmul(f.core.transposed(f.left), f.right), alpha=f.scale * float(factor) * update.weight)
        else:
            total.add_(method.delta(tensors, start), alpha=float(factor) * update.weight)
    return total.to(dtype or weight.dtype)


def _made(layer: FrozenLayer, parts: Sequence[Part]) -> Tensor:
    """Return W' in W's dtype, by the quickest way that keeps it."""
    quick = _quick_weight(layer, parts)
    return whole_weight(layer, parts) if quick is None else quick


def _quick_weight(layer: FrozenLayer, parts: Sequence[Part]) -> Tensor | None:
    """Return W' where W is in bfloat16 and the updates' factors are many: the one product that it takes, in bfloat16.

    The factors are rounded as they are beside W without W', by 2^-8 of dW; the sum with W is rounded once.
    """
    weight = values_of(effective_weight(layer))
    if weight.dtype != torch.bfloat16 or not all(u.method.additive and not u.method.replaces for u, _ in parts):
        return None
    lefts, rights = [], []
    for update, factor in parts:
        f = update.method.factors({k: values_of(v) for k, v in layer.tensors(update).items()})
        lefts.append((f.core.transposed(f.left) * (f.scale * factor * update.weight)).to(weight.dtype))
        rights.append(f.right.to(weight.dtype))
    right = torch.cat(rights) if len(rights) > 1 else rights[0]
    if len(right) <= _MANY:
        return None
    return torch.addmm(weight, torch.cat(lefts, 1) if len(lefts) > 1 else lefts[0], right)


def whole_bias(layer: FrozenLayer, parts: Sequence[Part]) -> Tensor | None:
    """Return b' (out) of updates with their weights, in W's dtype, or None where there is none."""
    own, dtype = layer._parameters.get("bias"), effective_weight(layer).dtype
    start = None if own is None else values_of(own).to(torch.promote_types(own.dtype, torch.float32))
    total = start
    for update, factor in parts:
        other = update.method.bias_of(update.trained(), start)
        if other is not None:
            # each update brings a whole bias, and has a part in the sum by how far it lies from the layer's own
            more = factor * update.weight * (values_of(other) - (0.0 if start is None else start))
            total = more if total is None else total + more
    return None if total is None else total.to(dtype, copy=True)


def has_bias(update: Update) -> bool:
    """Whether an update has another bias than its layer."""
    return update.method.bias_of(update.trained(), None) is not None

"""What an adapter does to one layer: a sum of terms, each a method and its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from spectune.adapters import fingerprint
from spectune.layers.factors import Base
from spectune.layers.kinds import LINEAR
from spectune.layers.projections import Rows
from spectune.layers.shards import whole
from spectune.methods import Method
from spectune.methods.head import Head
from spectune.methods.lora import LoRA

_TURNED = 0.1  # part of a basis that may come out otherwise elsewhere, beyond which it is stored with the adapter


class Lent:
    """A tensor that somebody else holds: what a call returns, or None once it is gone.

    Args:
        tensor: the tensor.
        seen: what a call makes of it.
    """

    def __init__(self, tensor: Tensor | None = None, seen: Callable[[Tensor], Tensor] | None = None) -> None:
        self._ref, self._seen = None if tensor is None else TensorWeakRef(tensor), seen

    def __call__(self) -> Tensor | None:
        tensor = None if self._ref is None else self._ref()
        return tensor if tensor is None or self._seen is None else self._seen(tensor)

    def __deepcopy__(self, memo: object) -> Lent:
        return self

    def __reduce__(self) -> tuple[object, ...]:  # in another process nobody holds it
        return Lent, ()


def _at_hand(held: Tensor | Lent | None) -> Tensor | None:
    return held() if isinstance(held, Lent) else held


@dataclass(frozen=True)
class Term:
    """weight * (the update that `method` makes of `trained` and, where it needs one, a basis).

    Args:
        method: the method.
        trained: its trained tensors.
        weight: factor of the update.
        basis: its frozen tensors, where they are at hand.
        sketch: of the update at weight 1, by which it is known to be reproduced.
        stays: the basis was made of another W than the base's, so that it is kept and stored with the term.
    """

    method: Method
    trained: Mapping[str, Tensor]
    weight: float = 1.0
    basis: Mapping[str, Tensor] | None = None
    sketch: Tensor | None = field(default=None, repr=False)
    stays: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Return trained and frozen tensors, float32 on the CPU."""
        everything = {**(self.basis or {}), **self.trained}
        return {n: on_cpu(t) for n, t in everything.items()}

    def scaled(self, factor: float) -> Term:
        """Return factor * this term; LoRA takes the factor into alpha and its sign into B, so that it stays plain."""
        if not isinstance(self.method, LoRA):
            return replace(self, weight=self.weight * factor)
        size = abs(factor) or 1.0
        sign = factor / size
        B = self.trained["B"] if sign == 1.0 else self.trained["B"] * sign
        method = self.method if size == 1.0 else replace(self.method, alpha=self.method.alpha * size)
        return replace(self, method=method, trained={**self.trained, "B": B})

    @property
    def lacks_basis(self) -> bool:
        """Whether the method has frozen tensors that are not at hand."""
        return self.basis is None and needs_basis(self.method)

    @property
    def hangs_on_rounding(self) -> bool:
        """Whether another processor would decompose W into other singular vectors than those at hand.

        Vectors of singular values that differ by d are turned into each other by about rounding * S_1 / d; where W has
        equal singular values, as an orthogonal W has, nothing but rounding chooses them.
        """
        S = self.method.spectrum(self.basis) if self.basis else None  # none on the meta device
        if S is None or S.is_meta or not S.any():
            return False
        S = on_cpu(S).double().sort(descending=True).values
        apart = torch.cat([S.new_tensor([math.inf]), -S.diff(), S.new_tensor([math.inf])])
        turned = (torch.finfo(torch.float32).eps * S[0] / torch.minimum(apart[1:], apart[:-1])).clamp(max=1)
        return float((S * turned).norm() / S.norm()) > _TURNED

    def sketched(self, weight: Tensor | None) -> Tensor | None:
        """Return the sketch, made now where it was not; None where none is needed or what it takes is not at hand.

        Args:
            weight: W (out x in).
        """
        needed, made_here = needs_basis(self.method), self.method.additive or weight is not None
        if self.sketch is not None or self.lacks_basis or not needed or not made_here:
            return self.sketch
        return self.make_sketch(weight)

    def make_sketch(self, weight: Tensor | None) -> Tensor:
        """Return the sketch of the update as it comes out here."""
        tensors = self.tensors()
        x = fingerprint.probes(self.method.factors(tensors).right.shape[1], 0).float()

        def through_base(rows: Tensor) -> Tensor:
            assert weight is not None
            return rows @ on_cpu(weight).mT

        def rows(index: Tensor) -> Tensor:
            assert weight is not None
            return on_cpu(weight[index.to(weight.device)])

        base = Base(lambda: through_base(x), lambda R: through_base(R).mT, rows=rows)
        return fingerprint.sketch_update(self.method.respond(tensors, x, base, False))

    def check(self, name: str, weight: Tensor | None, base_sketch: Tensor | None) -> None:
        """Raise unless the update is the one that was trained.

        Args:
            name: the layer.
            weight: W (out x in).
            base_sketch: of the W that it was trained on, where it is known.

        Raises:
            SpectuneError: the basis came out differently.
        """
        if self.sketch is not None and not self.lacks_basis:
            fingerprint.check_update(name, self.make_sketch(weight), self.sketch, weight, base_sketch)


@dataclass(frozen=True)
class LayerUpdate:
    """The sum of terms on one layer.

    Args:
        shape: (out, in) of the weight.
        terms: the terms.
        conv1d: the weight is stored transposed, as that of a Conv1D or of some modules of experts.
        held: W (out x in), where it is at hand, or the parameter that it is, lent.
        base_sketch: sketch of W, to know the base again.
        experts: how many experts have their weights in the tensor that W is a part of; 0 where it is a tensor itself.
        rows: which rows of a fused layer's weight W is, or None.
        kind: "linear", or the name of another kind of layer (`spectune.layers.kinds`).
        kernel: the axes of a convolution's kernel, which W has in its last.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    conv1d: bool = False
    held: Tensor | Lent | None = field(default=None, repr=False)
    base_sketch: Tensor | None = field(default=None, repr=False)
    experts: int = 0
    rows: Rows | None = None
    kind: str = LINEAR
    kernel: tuple[int, ...] = ()

    @property
    def weight(self) -> Tensor | None:
        """W (out x in), where it is at hand."""
        weight = _at_hand(self.held)
        return weight.T if weight is not None and self.conv1d and isinstance(self.held, Lent) else weight

    def trained_weight(self) -> Tensor:
        """Return W, which must be at hand, as the update was trained on it."""
        assert self.weight is not None
        return fingerprint.as_trained(self.weight.detach(), self.base_sketch)

    def sealed(self) -> LayerUpdate:
        """Return the update with its sketches, and without W and what can be made of W again."""
        if not any(needs_basis(term.method) for term in self.terms):
            return replace(self, held=None)
        base, weight = self.base(), self.weight
        if weight is not None and not all(term.method.additive for term in self.terms):
            weight = whole(weight)
        terms = tuple(
            replace(term, sketch=term.sketched(weight), basis=term.basis if term.stays else None) for term in self.terms
        )
        return replace(self, terms=terms, held=None, base_sketch=base)

    def base(self) -> Tensor | None:
        """Return the sketch of W, made now where W is at hand, else None."""
        if self.base_sketch is None and self.weight is not None:
            return fingerprint.sketch_weight(self.weight)
        return self.base_sketch


ADDED_BIAS = "added_bias"


@dataclass(frozen=True)
class WholeTerm:
    """weight * (a module's own tensors instead of the base's, less the base's).

    Args:
        tensors: by their names in the module; ADDED_BIAS is what is added to its bias, or to its answer if it has none.
        weight: factor of the difference.
        rows: the rows of an embedding, or of an output embedding, that "weight" (rows x d) stands for; None for all.
        complete: these are all the tensors of the module's state.
    """

    tensors: Mapping[str, Tensor]
    weight: float = 1.0
    rows: tuple[int, ...] | None = None
    complete: bool = False


def unchecked(term: Term) -> Term:
    """Return a term that is not compared with what it was on the base that it was trained on."""
    return replace(term, sketch=None)


def as_head(term: WholeTerm, conv1d: bool) -> Term | None:
    """Return the term that brings a linear layer whole, or None where the tensors are not all of one."""
    weight, bias = term.tensors.get("weight"), term.tensors.get("bias")
    if weight is None or weight.dim() != 2 or term.rows is not None or term.tensors.keys() - {"weight", "bias"}:
        return None
    own = {"H": weight.T if conv1d else weight, **({} if bias is None else {"h": bias})}
    own = {key: tensor.float().contiguous() for key, tensor in own.items()}
    return Term(Head(bias=bias is not None), own, term.weight)


def needs_basis(method: Method) -> bool:
    """Whether a method has frozen tensors besides W."""
    return method.request() is not None or type(method).basis is not Method.basis


def lora_term(left: Tensor, right: Tensor) -> Term:
    """Return the LoRA term with B = left (out x r), A = right (r x in) and s = 1."""
    rank = left.shape[1]
    return Term(LoRA(rank=rank, alpha=rank), {"A": right.contiguous(), "B": left.contiguous()})


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, in float32 if it is floating point."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor

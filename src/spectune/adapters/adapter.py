"""An adapter away from its model: a formal sum of updates for each layer, with its algebra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.errors import SpectuneError, nearest
from spectune.layers.adapted import effective_weight, find_linear
from spectune.layers.factors import Base
from spectune.methods import Method
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA
from spectune.spectral import decompose_many

Path_ = str | PathLike[str]


@dataclass(frozen=True)
class Term:
    """weight * (the update that `method` makes of `trained` and, where it needs one, a basis).

    Args:
        method: the method.
        trained: its trained tensors.
        weight: factor of the update.
        basis: its frozen tensors, where they are at hand.
    """

    method: Method
    trained: Mapping[str, Tensor]
    weight: float = 1.0
    basis: Mapping[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return trained and frozen tensors, float32 on the CPU."""
        everything = {**(self.basis or {}), **self.trained}
        return {
            n: t.detach().cpu().float() if t.is_floating_point() else t.detach().cpu() for n, t in everything.items()
        }


@dataclass(frozen=True)
class LayerUpdate:
    """The sum of terms on one layer.

    Args:
        shape: (out, in) of the weight.
        terms: the terms.
        conv1d: the layer is a Conv1D, whose weight is stored transposed.
        weight: W (out x in), where it is at hand.
        base_sketch: sketch of W, to know the base again.
        update_sketch: sketch of dW, to know that it is reproduced.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    conv1d: bool = False
    weight: Tensor | None = field(default=None, repr=False)
    base_sketch: Tensor | None = field(default=None, repr=False)
    update_sketch: Tensor | None = field(default=None, repr=False)


class Adapter:
    """A fine-tuned update of a model, off the model: saved, loaded, added, scaled, compressed and converted.

    Args:
        layers: module name -> update.
        base_model: id or folder of the model that it belongs to.
        error: relative Frobenius error ||dW - exact dW|| / ||exact dW|| over all layers, where it came from a
            truncation.
    """

    def __init__(self, layers: Mapping[str, LayerUpdate], base_model: str | None = None, error: float = 0.0) -> None:
        self.layers = dict(layers)
        self.base_model = base_model
        self.error = error

    def __repr__(self) -> str:
        methods = dict.fromkeys(t.method.name for layer in self.layers.values() for t in layer.terms)
        return f"Adapter({'+'.join(methods)} on {len(self.layers)} layers, {self.parameter_count():,} parameters)"

    def parameter_count(self) -> int:
        """Count the trained values."""
        return sum(t.numel() for layer in self.layers.values() for term in layer.terms for t in term.trained.values())

    # -- the update

    def layer(self, module_name: str) -> LayerUpdate:
        """Return one layer's update.

        Raises:
            SpectuneError: the adapter has no such layer; the nearest names are listed.
        """
        if module_name not in self.layers:
            raise SpectuneError(f"the adapter has no layer {module_name!r}{nearest(module_name, self.layers)}")
        return self.layers[module_name]

    def complete(self, module_name: str) -> LayerUpdate:
        """Return one layer's update with the frozen tensors of every term, recomputed from W where needed.

        Raises:
            SpectuneError: neither the basis nor W is at hand.
        """
        layer = self.layer(module_name)
        terms = []
        for term in layer.terms:
            if term.basis is None and needs_basis(term.method):
                if layer.weight is None:
                    raise SpectuneError(
                        f"{term.method.name} on {module_name!r} is stored without its basis and the base model is not "
                        'at hand: attach the adapter, call adapter.bind(model), or save it with bases="embed"'
                    )
                request = term.method.request()
                decomposition = request and decompose_many({module_name: layer.weight}, request)[module_name]
                term = replace(term, basis=term.method.basis(layer.weight.detach(), decomposition))
            terms.append(term)
        self.layers[module_name] = layer = replace(layer, terms=tuple(terms))
        return layer

    def delta(self, module_name: str) -> Tensor:
        """Return dW (out x in) of one layer, dense float32; for checks, never needed in use.

        Raises:
            SpectuneError: no such layer, or no basis at hand.
        """
        layer = self.complete(module_name)
        weight = None if layer.weight is None else layer.weight.detach().cpu().float()
        total = torch.zeros(layer.shape)
        for term in layer.terms:
            total += term.weight * term.method.delta(term.tensors(), _dense_weight(term, weight, module_name))
        return total

    def product(self, module_name: str, x: Tensor) -> Tensor:
        """Return x dW^T (n x out) for x (n x in), without dW.

        Raises:
            SpectuneError: no such layer, or no basis at hand.
        """
        layer = self.complete(module_name)
        weight = None if layer.weight is None else layer.weight.detach().cpu().float()

        def through_base(rows: Tensor) -> Tensor:
            if weight is None:
                raise SpectuneError(f"DoRA on {module_name!r} needs the base weight: call adapter.bind(model)")
            return rows @ weight.mT

        base = Base(lambda: through_base(x), through_base)
        parts = [term.weight * term.method.respond(term.tensors(), x, base, False) for term in layer.terms]
        return torch.stack(parts).sum(0)

    def sketch(self, module_name: str) -> Tensor:
        """Return the sketch of dW that was stored, or computed now where it was not."""
        layer = self.layer(module_name)
        if layer.update_sketch is None:
            x = fingerprint.probes(layer.shape[1], 0)
            made = fingerprint.sketch(self.product(module_name, x))
            self.layers[module_name] = layer = replace(self.layer(module_name), update_sketch=made)
        assert layer.update_sketch is not None
        return layer.update_sketch

    def bind(self, model: torch.nn.Module) -> Adapter:
        """Give the adapter the weights of its base, from which it recomputes bases when asked for dW.

        Raises:
            SpectuneError: a layer is missing in the model, or is another weight than the adapter was trained on.
        """
        weights = {name: effective_weight(find_linear(model, name)).detach() for name in self.layers}
        for name, layer in self.layers.items():
            fingerprint.check_base(name, weights[name], layer.base_sketch, layer.shape)
        self.layers = {name: replace(layer, weight=weights[name]) for name, layer in self.layers.items()}
        return self

    # -- algebra

    def __mul__(self, factor: float) -> Adapter:
        layers = {}
        for name, layer in self.layers.items():
            terms = [replace(term, weight=term.weight * factor) for term in layer.terms]
            sketch = None if layer.update_sketch is None else layer.update_sketch * factor
            layers[name] = replace(layer, terms=_collect(terms), update_sketch=sketch)
        return Adapter(layers, self.base_model, self.error)

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __truediv__(self, divisor: float) -> Adapter:
        return self * (1.0 / divisor)

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -other

    def __add__(self, other: Adapter) -> Adapter:
        if not isinstance(other, Adapter):
            return NotImplemented
        layers = dict(self.layers)
        for name, theirs in other.layers.items():
            ours = layers.get(name)
            layers[name] = theirs if ours is None else _add_layers(name, ours, theirs)
        return Adapter(layers, self.base_model or other.base_model, max(self.error, other.error))

    # -- other forms of the same update

    def compress(self, rank: int) -> Adapter:
        """Return the best LoRA of this rank, from a QR of the stacked factors; `error` says how far it is.

        Args:
            rank: columns of B and rows of A in each layer (fewer where the layer has fewer).

        Raises:
            SpectuneError: rank below 1, or no basis at hand.
        """
        from spectune.adapters.compress import compress

        return compress(self, rank)

    def to_lora(self, rank: int | None = None) -> Adapter:
        """Return a LoRA with this update: exact where `rank` is None or holds it, the best of that rank otherwise.

        Without a rank each layer takes what it needs: r for LoRA, LoRA-XS and what AdaLoRA kept, 2r for PiSSA and
        MiLoRA, min(out, in) for SVF, SVFT and DoRA.

        Raises:
            SpectuneError: rank below 1, or no basis at hand.
        """
        from spectune.adapters.compress import to_lora

        return to_lora(self, rank)

    # -- files

    def save(self, path: Path_, *, bases: Literal["none", "embed"] = "none") -> Path:
        """Write the adapter to a folder: PEFT's own format for LoRA and DoRA, spectune's for the rest.

        Args:
            path: the folder, made if need be.
            bases: "embed" stores the frozen tensors too, so that no decomposition is needed to load it.
        """
        from spectune.adapters.files import save

        return save(self, Path(path), embed=bases == "embed")

    @staticmethod
    def load(path: Path_) -> Adapter:
        """Read an adapter's folder, in spectune's or PEFT's format.

        Raises:
            SpectuneError: missing, truncated or tampered files, or a config that is not understood.
        """
        from spectune.adapters.files import load

        return load(Path(path))

    def export(self, path: Path_, format: Literal["peft"] = "peft", *, rank: int | None = None) -> Adapter:
        """Write the adapter as a PEFT LoRA folder (DoRA around LoRA stays DoRA) and return what was written.

        Args:
            path: the folder, made if need be.
            format: "peft".
            rank: the best LoRA of this rank instead of an exact one; its `error` says how far it is.

        Raises:
            SpectuneError: an unknown format, or no basis at hand.
        """
        from spectune.adapters.peft_format import is_peft, save_peft

        if format != "peft":
            raise SpectuneError(f"format must be 'peft', not {format!r}; spectune.merge(model) makes a merged model")
        adapter = self if is_peft(self) and rank is None else self.to_lora(rank)
        save_peft(adapter, Path(path))
        return adapter

    @staticmethod
    def from_peft(path: Path_) -> Adapter:
        """Read a LoRA, DoRA, converted PiSSA or AdaLoRA folder that PEFT wrote.

        Raises:
            SpectuneError: missing or damaged files, or a kind of adapter that is not one of these.
        """
        from spectune.adapters.peft_format import load_peft

        return load_peft(Path(path))


def needs_basis(method: Method) -> bool:
    """Whether a method has frozen tensors besides W."""
    return method.request() is not None or not method.additive or type(method).basis is not Method.basis


def lora_term(left: Tensor, right: Tensor) -> Term:
    """Return the LoRA term with B = left (out x r), A = right (r x in) and s = 1."""
    rank = left.shape[1]
    return Term(LoRA(rank=rank, alpha=rank), {"A": right.contiguous(), "B": left.contiguous()})


def _dense_weight(term: Term, weight: Tensor | None, name: str) -> Any:
    if weight is None and isinstance(term.method, DoRA):
        raise SpectuneError(f"DoRA on {name!r} needs the base weight: call adapter.bind(model)")
    return weight


def _add_layers(name: str, ours: LayerUpdate, theirs: LayerUpdate) -> LayerUpdate:
    if ours.shape != theirs.shape:
        raise SpectuneError(f"the adapters differ in the shape of {name!r}: {ours.shape} and {theirs.shape}")
    a, b = ours.base_sketch, theirs.base_sketch
    if a is not None and b is not None and not fingerprint.agrees(a, b, 1e-2):
        raise SpectuneError(f"the adapters belong to different bases: {name!r} is another weight in each")
    known = ours.update_sketch is not None and theirs.update_sketch is not None
    return replace(
        ours,
        terms=_collect([*ours.terms, *theirs.terms]),
        weight=ours.weight if ours.weight is not None else theirs.weight,
        base_sketch=a if a is not None else b,
        update_sketch=ours.update_sketch + theirs.update_sketch if known else None,  # type: ignore[operator]
    )


def _collect(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Join the terms that one term can hold: the same basis adds coefficients, LoRA stacks its factors."""
    sums: dict[tuple[str, str], tuple[Method, dict[str, Tensor], Term]] = {}
    loras: list[Term] = []
    others: list[Term] = []
    for term in terms:
        method = term.method
        tensors = {**(term.basis or {}), **{k: v.double() for k, v in term.trained.items()}}
        coefficients = method.coefficients(tensors)
        if coefficients is not None:
            plain, _ = method.from_coefficients(coefficients)
            key = (method.basis_key, repr(plain))
            scaled = {k: term.weight * v for k, v in coefficients.items()}
            if key in sums:
                before = sums[key][1]
                scaled = {k: before[k] + v for k, v in scaled.items()}
                term = term if term.basis is not None else sums[key][2]
            sums[key] = (method, scaled, term)
        elif isinstance(method, LoRA):
            loras.append(term)
        else:
            others.append(term)
    joined = []
    for method, coefficients, term in sums.values():
        plain, trained = method.from_coefficients(coefficients)
        joined.append(Term(plain, {k: v.float() for k, v in trained.items()}, 1.0, term.basis))
    if len(loras) == 1 and loras[0].weight == 1.0:
        joined += loras
    elif loras:
        left = torch.cat([t.trained["B"] * (t.weight * t.method.scale) for t in loras], dim=1)  # type: ignore[attr-defined]
        joined.append(lora_term(left, torch.cat([t.trained["A"] for t in loras], dim=0)))
    return tuple(joined + others)

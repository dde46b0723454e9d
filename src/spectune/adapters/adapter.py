"""An adapter away from its model: a formal sum of updates for each layer, with its algebra."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.terms import LayerUpdate, add_layers, needs_basis, on_cpu
from spectune.errors import SpectuneError, nearest
from spectune.layers.adapted import effective_weight, find_linear
from spectune.spectral import Request, decompose_many

Path_ = str | PathLike[str]


class Adapter:
    """A fine-tuned update of a model, off the model: saved, loaded, added, scaled, compressed and converted.

    Args:
        layers: module name -> update.
        base_model: id or folder of the model that it belongs to.
        labels: what a classifier's logits stand for, in their order, where the adapter brings a classifier's head.
        error: relative Frobenius error ||dW - exact dW|| / ||exact dW|| over all layers, where it came from a
            truncation.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerUpdate],
        base_model: str | None = None,
        error: float = 0.0,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.base_model = base_model
        self.error = error
        self.labels = None if labels is None else tuple(labels)

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

    def complete(self, *names: str) -> Adapter:
        """Recompute from W the frozen tensors that are not at hand, of the named layers or of all.

        Raises:
            SpectuneError: no such layer, W is not at hand either, or the basis came out differently.
        """
        lacking: defaultdict[Request | None, set[str]] = defaultdict(set)
        for name in names or self.layers:
            for term in self.layer(name).terms:
                if term.lacks_basis:
                    if self.layers[name].weight is None:
                        raise SpectuneError(
                            f"{term.method.name} on {name!r} is stored without its basis and the base model is not "
                            'at hand: attach the adapter, call adapter.bind(model), or save it with bases="embed"'
                        )
                    lacking[term.method.request()].add(name)
        weights = {name: self.layers[name].trained_weight() for name in set().union(*lacking.values())}
        found: dict[Request | None, Mapping[str, Any]] = {
            request: decompose_many({name: weights[name] for name in of}, request)
            for request, of in lacking.items()
            if request is not None
        }
        for name, weight in weights.items():
            layer, terms = self.layers[name], []
            for term in layer.terms:
                if term.lacks_basis:
                    decomposition = found.get(term.method.request(), {}).get(name)
                    term = replace(term, basis=term.method.basis(weight, decomposition))
                    term.check(name, layer.weight, layer.base_sketch)
                terms.append(term)
            self.layers[name] = replace(layer, terms=tuple(terms))
        return self

    def delta(self, module_name: str) -> Tensor:
        """Return dW (out x in) of one layer, dense float32; for checks, never needed in use.

        Raises:
            SpectuneError: no such layer, or no basis at hand.
        """
        layer = self.complete(module_name).layers[module_name]
        total = torch.zeros(layer.shape)
        for term in layer.terms:
            if layer.weight is None and not term.method.additive:
                raise SpectuneError(
                    f"{term.method.name} on {module_name!r} needs the base weight: call adapter.bind(model)"
                )
            weight = torch.empty(0) if layer.weight is None else on_cpu(layer.weight)
            total += term.weight * term.method.delta(term.tensors(), weight)
        return total

    def self_contained(self, module_name: str) -> bool:
        """Whether dW of one layer can be had without the base's weight."""
        return all(
            (term.method.additive or term.method.replaces) and not term.lacks_basis
            for term in self.layer(module_name).terms
        )

    def base_sketch(self, module_name: str) -> Tensor | None:
        """Return the sketch of one layer's W where the update depends on W, else None."""
        layer = self.layer(module_name)
        if not any(needs_basis(term.method) for term in layer.terms):
            return None
        self.layers[module_name] = layer = replace(layer, base_sketch=layer.base())
        return layer.base_sketch

    def bind(self, model: torch.nn.Module) -> Adapter:
        """Give the adapter the weights of its base, from which it recomputes bases when asked for dW.

        Raises:
            SpectuneError: a layer is missing in the model, or is another weight than the adapter was trained on.
        """
        weights = {name: effective_weight(find_linear(model, name)).detach() for name in self.layers}
        self.check_base(weights)
        self.layers = {name: replace(layer, weight=weights[name]) for name, layer in self.layers.items()}
        return self

    def check_base(self, weights: Mapping[str, Tensor]) -> None:
        """Raise unless weights (out x in), by layer, are those that the adapter was trained on.

        Raises:
            SpectuneError: a shape differs, or the values where the update depends on them; the layer is named.
        """
        for name, layer in self.layers.items():
            fingerprint.check_shape(name, weights[name], layer.shape)
        for name in list(self.layers):
            sketch = self.base_sketch(name)
            if sketch is not None:
                fingerprint.check_weight(name, weights[name], sketch)

    # -- algebra

    def __mul__(self, factor: float) -> Adapter:
        if not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise SpectuneError(f"an adapter's weight must be a finite number, not {factor!r}")
        layers = {
            name: replace(layer, terms=tuple(term.scaled(float(factor)) for term in layer.terms))
            for name, layer in self.layers.items()
        }
        return Adapter(layers, self.base_model, self.error, self.labels)

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
        if self.labels and other.labels and self.labels != other.labels:
            raise SpectuneError(
                f"adapters whose heads have different labels cannot be added: {', '.join(self.labels)}; "
                f"and {', '.join(other.labels)}"
            )
        layers = dict(self.layers)
        for name, theirs in other.layers.items():
            ours = layers.get(name)
            layers[name] = theirs if ours is None else add_layers(name, ours, theirs)
        base, error = self.base_model or other.base_model, max(self.error, other.error)
        return Adapter(layers, base, error, self.labels or other.labels)

    def by_layer(self, weights: Mapping[str, float]) -> Adapter:
        """Return the adapter with a weight of its own for each layer, without the layers that have none or 0.

        Args:
            weights: module name -> factor of its update.

        Raises:
            SpectuneError: the adapter has no such layer, or a weight is not a finite number.
        """
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise SpectuneError(f"an adapter's weight must be a finite number, not {weight!r}, in {name!r}")
        layers = {
            name: replace(self.layer(name), terms=tuple(term.scaled(weight) for term in self.layer(name).terms))
            for name, weight in weights.items()
            if weight
        }
        return Adapter(layers, self.base_model, self.error)

    # -- other forms of the same update

    def compress(self, rank: int) -> Adapter:
        """Return the best LoRA of this rank, from the stacked factors alone; `error` says how far it is.

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

        Returns:
            The folder.

        Raises:
            SpectuneError: the adapter has no layers, or bases are to be embedded that are not at hand.
        """
        if bases not in ("none", "embed"):
            raise SpectuneError(f"bases must be 'none' or 'embed', not {bases!r}")
        from spectune.adapters.spectune_format import save

        return save(self, Path(path), embed=bases == "embed")

    @staticmethod
    def load(path: Path_) -> Adapter:
        """Read an adapter's folder, in spectune's or PEFT's format.

        Raises:
            SpectuneError: missing, truncated or tampered files, or a config that is not understood.
        """
        from spectune.adapters.files import read_whole
        from spectune.adapters.spectune_format import load

        return read_whole(load, Path(path))

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
        from spectune.adapters.files import read_whole
        from spectune.adapters.peft_format import load_peft

        return read_whole(load_peft, Path(path))

"""What an adapter is made of, away from its model: the update of each layer, and what belongs to all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.labels import Labels
from spectune.adapters.terms import LayerUpdate, WholeTerm, on_cpu
from spectune.errors import SpectuneError, nearest
from spectune.methods.base import Decomposition
from spectune.spectral import Request, decompose_many

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing only from Python 3.11 on


class Contents:
    """The updates of an adapter's layers, which the file formats and the compression take and return.

    Args:
        layers: module name -> update.
        base_model: id or folder of the model that it belongs to.
        error: relative Frobenius error ||dW - exact dW|| / ||exact dW|| over all layers, where it came from a
            truncation.
        labels: what a classifier's logits stand for, in their order, where the adapter brings a classifier's head.
        modules: module name -> sum of terms, of the modules other than linear layers that the adapter brings whole.
        architecture: class of the model that it was trained on, and the module that the class is in.
        groups: modules all of whose tensors the adapter brings, by the name of the outermost.
        quantize: how `load_base` packed the base that it was trained on; None where it was not packed, or not by that.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerUpdate],
        base_model: str | None = None,
        error: float = 0.0,
        labels: Sequence[str] | None = None,
        modules: Mapping[str, Sequence[WholeTerm]] | None = None,
        architecture: tuple[str, str] | None = None,
        groups: Sequence[str] = (),
        quantize: str | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.base_model = base_model
        self.error = error
        self.labels = labels if labels is None or isinstance(labels, Labels) else Labels(labels)
        self.architecture, self.groups, self.quantize = architecture, tuple(groups), quantize
        self.modules = {name: tuple(terms) for name, terms in (modules or {}).items()}

    def parameter_count(self) -> int:
        """Count the trained values."""
        tensors = [t for layer in self.layers.values() for term in layer.terms for t in term.trained.values()]
        tensors += [t for terms in self.modules.values() for term in terms for t in term.tensors.values()]
        return sum(t.numel() for t in tensors)

    def layer(self, module_name: str) -> LayerUpdate:
        """Return one layer's update.

        Raises:
            SpectuneError: the adapter has no such layer; the nearest names are listed.
        """
        if module_name not in self.layers:
            raise SpectuneError(f"the adapter has no layer {module_name!r}{nearest(module_name, self.layers)}")
        return self.layers[module_name]

    def complete(self, *names: str) -> Self:
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
        # all layers of one kind of decomposition at once, so that they are computed side by side and each is looked for
        # in the cache
        weights = {name: self.layers[name].trained_weight() for name in set().union(*lacking.values())}
        found: dict[Request | None, Mapping[str, Decomposition]] = {
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
        """Return the sketch of one layer's W where the layer's answer depends on W and it is known, else None."""
        layer = self.layer(module_name)
        if all(term.method.replaces for term in layer.terms):
            return None
        self.layers[module_name] = layer = replace(layer, base_sketch=layer.base())
        return layer.base_sketch

    def check_base(self, weights: Mapping[str, Tensor], *, values: bool = True) -> None:
        """Raise unless weights (out x in), by layer, are those that the adapter was trained on.

        Args:
            weights: the weights.
            values: compare these too, and not shapes alone.

        Raises:
            SpectuneError: a shape differs, or the values where the update depends on them; the layer is named.
        """
        for name, layer in self.layers.items():
            fingerprint.check_shape(name, weights[name], layer.shape)
        for name in list(self.layers) if values else ():
            sketch = self.base_sketch(name)
            if sketch is not None:
                fingerprint.check_weight(name, weights[name], sketch, self.quantize)

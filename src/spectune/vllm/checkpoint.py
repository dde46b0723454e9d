"""The weights of a base's checkpoint by the names of its layers, and the bases that methods make of them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.terms import LayerUpdate, Term, needs_basis
from spectune.errors import SpectuneError
from spectune.methods import Method
from spectune.reading import open_tensors
from spectune.spectral import decompose_many


class Checkpoint:
    """A base's weights on disk, one at a time.

    An engine may hold W fused with others, in parts, or packed for its kernels, so that W is read from where it came.

    Args:
        folder: with files of safetensors.

    Raises:
        SpectuneError: there are none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with open_tensors(path) as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        if not self._files:
            raise SpectuneError(
                f"{str(self.folder)!r} holds no safetensors, from which the singular vectors of the base could be had"
            )
        self._bases: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._small: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._sketches: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    def weight(self, layer: str) -> Tensor:
        """Return W (out x in) of a layer.

        Raises:
            SpectuneError: the checkpoint has no such matrix.
        """
        parts = layer.split(".")
        # checkpoints of a model alone lack the prefix that it has within one with a head
        names = [f"{'.'.join(parts[i:])}.weight" for i in range(2 if len(parts) > 1 else 1)]
        name = next((name for name in names if name in self._files), None)
        if name is None:
            raise SpectuneError(
                f"the checkpoint {str(self.folder)!r} has no weight of {layer!r}: the adapter belongs to another base, "
                "or the base is quantized, and then this plug-in cannot serve it; merge it, or export a LoRA"
            )
        with open_tensors(self._files[name]) as file:
            weight = file.get_tensor(name)
        if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise SpectuneError(
                f"the weight of {layer!r} is {tuple(weight.shape)} of {weight.dtype} in the checkpoint, no matrix of "
                "16 or 32 bits; merge the adapter, or export a LoRA"
            )
        return weight

    def checked(self, layer: str, update: LayerUpdate, bound: Container[str] = ()) -> tuple[Term, ...]:
        """Return the terms of a layer with the frozen tensors that they have on this base.

        Args:
            layer: the layer.
            update: what an adapter has on it.
            bound: keys of bases that are at hand already: a term over one has but a few rows of L and columns of R,
                which tell whether it comes out as it was trained.

        Raises:
            SpectuneError: the adapter belongs to another base, or would not reproduce its update here.
        """
        self._check_base(layer, update)
        return tuple(self._checked(layer, update, term, bound) for term in update.terms)

    def release(self) -> None:
        """Let go of bases over which cores are; whoever holds them keeps them."""
        for key in self._small:
            self._bases.pop(key, None)

    def _check_base(self, layer: str, update: LayerUpdate) -> None:
        if layer not in self._sketches:
            weight = self.weight(layer)
            self._sketches[layer] = fingerprint.sketch_weight(weight)
            self._shapes[layer] = weight.shape[0], weight.shape[1]
        fingerprint.check_shape(layer, torch.empty(self._shapes[layer], device="meta"), update.shape)
        theirs = update.base_sketch
        if theirs is not None and not fingerprint.same_weight(self._sketches[layer], theirs):
            fingerprint.check_weight(layer, self.weight(layer), theirs)  # says so

    def _checked(self, layer: str, update: LayerUpdate, term: Term, bound: Container[str]) -> Term:
        method, key = term.method, (layer, term.method.basis_key)
        if method.core_only and method.basis_key in bound and key in self._small:
            term = replace(term, basis=self._small[key])
            made = method.factors({**self._small[key], **term.trained}).dense().flatten()
            if term.sketch is not None and not _same(layer, made, term.sketch):
                full = replace(term, basis=self._basis(layer, update, method))
                full.check(layer, self.weight(layer), update.base_sketch)
            return term
        if needs_basis(method):
            term = replace(term, basis=self._basis(layer, update, method))
        term.check(layer, self.weight(layer), update.base_sketch)
        return term

    def _basis(self, layer: str, update: LayerUpdate, method: Method) -> dict[str, Tensor]:
        """Return the frozen tensors of a method on a layer, made once for all adapters."""
        key = layer, method.basis_key
        if key not in self._bases:
            source, request = fingerprint.as_trained(self.weight(layer), update.base_sketch), method.request()
            found = {} if request is None else decompose_many({layer: source}, request)
            self._bases[key] = basis = method.basis(source, found.get(layer))
            if method.core_only:
                self._small[key] = _probed(method, basis, update)
        return self._bases[key]


def _probed(method: Method, basis: Mapping[str, Tensor], update: LayerUpdate) -> dict[str, Tensor]:
    """Return a basis with P_out L in the place of L and R P_in^T in that of R, of which sketches are made."""
    start = method.initial(method.shapes(*update.shape), basis)
    factors = method.factors({**basis, **start})
    small = dict(basis)
    for name, tensor in basis.items():
        if tensor is factors.left:
            small[name] = (fingerprint.probes(tensor.shape[0], 1) @ tensor.double()).float()
        elif tensor is factors.right:
            small[name] = (tensor.double() @ fingerprint.probes(tensor.shape[1], 0).mT).float()
    return small


def _same(layer: str, made: Tensor, stored: Tensor) -> bool:
    try:
        fingerprint.check_update(layer, torch.cat([made, made.norm()[None]]), stored, None, None)
    except SpectuneError:
        return False
    return True

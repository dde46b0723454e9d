"""The adapters of a library that are in memory, and the few of them that are on the model."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.adapters.adapter import Adapter
from spectune.adapters.terms import Term
from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import effective_weight, find_linear
from spectune.model.adapting import attach
from spectune.model.install import choose, install, selections
from spectune.model.lifecycle import detach
from spectune.model.names import adapter_names
from spectune.model.routing import activate, route
from spectune.private import copy_all
from spectune.transformer2.library import EMPTY, Library, Record
from spectune.transformer2.mix import Mixture
from spectune.transformer2.packed import Packed, Structure, pack, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.layers.stacks import Stack

_PREFIX = "library-"


class Pool:
    """Bring adapters of a library to a model: from disk into memory, from memory into slots on the model.

    A slot is an adapter on the model whose values are overwritten; those of one structure take turns in it.  In memory
    an adapter is its trained values alone, and the bases are on the model once.

    Args:
        model: the base; its own adapters, if it has any, stay as they are.
        library: the library.
        max_bytes: of values in memory; the least recently used go first.
        slots: adapters that stay on the model; a batch that needs more has more while it lasts.

    Raises:
        SpectuneError: the library is empty, or its base is another model.
    """

    def __init__(self, model: PreTrainedModel, library: Library, max_bytes: int = 1 << 30, slots: int = 8) -> None:
        if not len(library):
            raise SpectuneError(EMPTY.format(str(library.path)))
        self.model, self.library = model, library
        self.max_bytes, self.slots = max_bytes, slots
        # by record, which is another one when an adapter is replaced under its name; the least recently used first
        self._packed: OrderedDict[Record, Packed] = OrderedDict()
        self._slots: OrderedDict[Record, str] = OrderedDict()
        self._verified: set[Record] = set()  # those in memory that came out as trained over the bases here
        self._structures: dict[Structure, Structure] = {}
        self._slot_structures: dict[str, Structure] = {}
        self._parameters: dict[str, list[Tensor]] = {}
        self._sketches: dict[str, Tensor] = {}
        self._others: dict[str, Adapter] = {}
        self._stacks: dict[object, Stack] = {}  # of the slots' factors, for rows that differ
        for layer, sketch in library.sketches().items():
            self._check_layer(layer, sketch, f"the library {str(library.path)!r}")

    # -- memory

    @property
    def bytes(self) -> int:
        """Bytes of the values in memory."""
        return sum(packed.bytes for packed in self._packed.values())

    def load(self, name: str) -> Packed:
        """Return an adapter's values, from memory or else from disk, checked against the model.

        Raises:
            SpectuneError: no such adapter, damaged files, or another base.
        """
        record = self.library.record(name)
        if record in self._packed:
            self._packed.move_to_end(record)
            return self._packed[record]
        adapter = self.library.adapter(name)
        for layer_name, layer in adapter.layers.items():
            if layer.base_sketch is not None:
                self._check_layer(layer_name, layer.base_sketch, f"the adapter {name!r}")
        structure = structure_of(adapter)
        packed = pack(adapter, self._structures.setdefault(structure, structure))
        # over bases that another adapter has put on the model, which may have come out otherwise where this one was
        # trained
        if self._twin(packed) is not None:
            self._verify(record, adapter)
        self._packed[record] = packed
        while self.bytes > self.max_bytes and len(self._packed) > 1:
            self._verified.discard(self._packed.popitem(last=False)[0])
        return packed

    def _twin(self, packed: Packed) -> str | None:
        """Return a slot of an adapter's structure, whose bases are its own."""
        return next((s for s, structure in self._slot_structures.items() if structure is packed.structure), None)

    def _verify(self, record: Record, adapter: Adapter) -> None:
        """Raise unless an adapter comes out as it was trained over the bases that are on the model."""
        layers = adapted_layers(self.model)
        for layer_name, layer in adapter.layers.items():
            weight = effective_weight(layers[layer_name]).detach()
            for term in layer.terms:
                tensors = getattr(layers[layer_name].bases._modules.get(term.method.basis_key), "_buffers", None)
                replace(term, basis=tensors).check(layer_name, weight, layer.base_sketch)
        self._verified.add(record)

    def _check_layer(self, layer: str, sketch: Tensor, whose: str) -> None:
        if layer not in self._sketches:
            try:
                weight = effective_weight(find_linear(self.model, layer))
            except SpectuneError as error:
                raise SpectuneError(f"{whose} belongs to another base: {error}") from None
            self._sketches[layer] = fingerprint.sketch_weight(weight)
        if not fingerprint.same_weight(self._sketches[layer], sketch):
            raise SpectuneError(f"{whose} belongs to another base: the weight of {layer!r} differs in this model")

    # -- on the model

    @torch.inference_mode(False)  # bases that are made now may be trained through later
    def place(self, names: Iterable[str]) -> dict[str, str]:
        """Put adapters on the model and return the slot of each.

        Raises:
            SpectuneError: as `load`.
        """
        wanted = {self.library.record(name): name for name in names}
        for record in wanted:
            if record in self._slots:
                self._slots.move_to_end(record)
        for record in wanted:
            if record not in self._slots:
                self._slots[record] = self._fill(record, wanted)
        idle = [record for record in self._slots if record not in wanted]
        for record in idle[: max(0, len(self._slots) - self.slots)]:
            self._empty(record)
        return {name: self._slots[record] for record, name in wanted.items()}

    def _fill(self, record: Record, keep: Container[Record]) -> str:
        packed = self.load(record.name)
        if self._twin(packed) is None:
            slot = self._new_slot()
            self._attach(self.library.adapter(record.name), slot)  # makes the bases, and checks everything
            self._verified.add(record)
        else:
            if record not in self._verified:
                self._verify(record, self.library.adapter(record.name))
            if len(self._slots) >= self.slots:
                # the least recently used slot of this structure takes the values: no layer changes its class, and no
                # basis is made
                for other in [other for other in self._slots if other not in keep]:
                    if self._slot_structures[self._slots[other]] is packed.structure:
                        slot = self._slots.pop(other)
                        with torch.no_grad():
                            copy_all(self._parameters[slot], packed.tensors(self.model.device))
                        return slot
            slot = self._new_slot()
            install(self.model, _plan(packed), slot)
        # attaching makes an adapter answer; here the caller says what does
        activate(self.model, None)
        layers = cast("dict[str, Any]", adapted_layers(self.model))
        parameters = [layers[p.layer].adapters[slot][p.term]._parameters[p.key] for p in packed.structure]
        self._parameters[slot] = [parameter.requires_grad_(False) for parameter in parameters]
        self._slot_structures[slot] = packed.structure
        return slot

    def _attach(self, adapter: Adapter, slot: str) -> None:
        """Attach an adapter, and leave what trains and how to the model's own adapters."""
        shared = selections(adapted_layers(self.model))
        factored = [selection.factored for selection in shared]
        training = [p for p in self.model.parameters() if p.requires_grad] if shared else []
        attach(self.model, adapter, slot)
        for selection, before in zip(shared, factored, strict=True):
            selection.factored = before
        for parameter in training:
            parameter.requires_grad_(True)

    def _new_slot(self) -> str:
        taken = set(adapter_names(self.model))
        return next(slot for i in count() if (slot := f"{_PREFIX}{i}") not in taken)

    def _empty(self, record: Record) -> None:
        slot = self._slots.pop(record)
        detach(self.model, slot)
        self._stacks.clear()
        del self._parameters[slot], self._slot_structures[slot]

    def activate(self, mixture: Mixture | None) -> None:
        """Have a mixture of the library's adapters, or with None the base alone, answer every row."""
        if not mixture:
            if adapted_layers(self.model):
                activate(self.model, None)
            return
        activate(self.model, self._placed([mixture])[0])

    @contextmanager
    def route(self, rows: Sequence[Mixture]) -> Iterator[None]:
        """Within the context, give each row of a batch a mixture of the library's adapters; empty is the base."""
        if not any(rows):
            self.activate(None)
            yield
            return
        with route(self.model, self._placed(rows), stacks=self._stacks):
            yield

    def _placed(self, rows: Sequence[Mixture]) -> list[Mixture]:
        """Return mixtures of slots for mixtures of names."""
        for row in rows:
            for name, weight in row.items():
                if isinstance(weight, float) and not math.isfinite(weight):
                    raise SpectuneError(f"the weight of adapter {name!r} must be a finite number, not {weight!r}")
        slots = self.place(name for row in rows for name in row)
        return [{slots[name]: weight for name, weight in row.items()} for row in rows]

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Within the context what answers may change; afterwards the model's own adapters answer as before."""
        before = {id(s): s.mixture for s in selections(adapted_layers(self.model))}
        try:
            yield
        finally:
            layers = adapted_layers(self.model)
            for selection in selections(layers):
                choose([x for x in layers.values() if x.selection is selection], before.get(id(selection), {}))

    @torch.inference_mode(False)
    def activate_other(self, adapter: Adapter) -> None:
        """Have an adapter that is not in the library answer every row; it stays on the model until `close`."""
        slot = next((slot for slot, other in self._others.items() if other is adapter), None)
        if slot is None:
            slot = self._new_slot()
            self._attach(adapter, slot)
            self._others[slot] = adapter
        activate(self.model, slot)

    def close(self) -> None:
        """Take off the model what was put on it."""
        for record in list(self._slots):
            self._empty(record)
        for slot in self._others:
            detach(self.model, slot)
        self._others.clear()


def _plan(packed: Packed) -> dict[str, list[Term]]:
    """Return the terms of a packed adapter by layer."""
    terms: dict[tuple[str, int], Term] = {}
    for piece, tensor in zip(packed.structure, packed.tensors(torch.device("cpu")), strict=True):
        key = (piece.layer, piece.term)
        trained = {**terms[key].trained, piece.key: tensor} if key in terms else {piece.key: tensor}
        terms[key] = Term(piece.method, trained, piece.weight)
    plan: dict[str, list[Term]] = {}
    for (layer, _), term in terms.items():
        plan.setdefault(layer, []).append(term)
    return plan

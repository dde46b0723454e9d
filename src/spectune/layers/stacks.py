"""Factors of many adapters side by side, kept from one batch to the next and made again where they changed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from spectune.layers.cores import Core
from spectune.layers.protocols import Layer
from spectune.layers.sources import Sources
from spectune.layers.updates import Update
from spectune.layers.values import values_of
from spectune.private import copy_all
from spectune.speed.room import has_room

_LARGEST = 2  # numbers held for each that trains, as PiSSA's; what needs more (VeRA) answers adapter by adapter
_SPARE = 4  # times as much memory as a batch needs is kept for another one as large as those before


class Pieces(NamedTuple):
    """What an update answers with: L, R, the values of C (None is the identity) and the ratio (None is one).

    Of n updates side by side each has a first axis (n); L and R have none where they are frozen, and all share them.
    """

    left: Tensor
    right: Tensor
    values: Tensor | None
    ratio: Tensor | None


class Stack:
    """The pieces of updates of one kind on a layer, side by side.

    They are kept from call to call, and made again for the updates whose tensors are others than they were.  Where
    memory is short, they are made at every call.

    Args:
        layer: the layer.
        like: an update of the kind.

    Attributes:
        core: one of the cores.
        by_core: whether L and R are shared and nothing else but C makes a difference.
        by_ratio: whether there is one.
        unfit: whether an update turned out to take so much of a row of W that the rest is no difference of products, or
            to be of this kind no longer.
        small: whether what is copied is little more than what trains.
    """

    def __init__(self, layer: Layer, like: Update) -> None:
        self._layer, self.unfit = layer, False
        one, self.core = self._of(like)
        tensors, trained = layer.tensors(like), like.trained()
        # a piece that is one of the tensors is told by being that very object: what `factors` makes of them is
        # another one, and has to be made again when they change
        names = [next((key for key, tensor in tensors.items() if tensor is piece), None) for piece in one]
        shared = [name is not None and name not in trained for name in names]
        self._shared = [piece if of_all else None for piece, of_all in zip(one, shared, strict=True)]
        self._frozen = {
            name: piece for name, piece in zip(names, self._shared, strict=True) if name and piece is not None
        }
        own = {k: piece for k, piece in enumerate(one) if piece is not None and not shared[k]}
        self._trained = {k: name for k in own if (name := names[k]) in trained}
        # what is computed may depend on any trained tensor: all of them are looked at then, and else those alone that
        # are answered with
        self._computed = len(self._trained) < len(own)
        self._names = list(trained) if self._computed else list(self._trained.values())
        self.by_core, self.by_ratio = all(shared[:2]) and one.ratio is None, one.ratio is not None
        self._shapes = {k: piece.shape for k, piece in own.items()}
        self._bytes = sum(piece.nbytes for piece in own.values())
        self.small = sum(map(torch.numel, own.values())) <= _LARGEST * sum(map(torch.numel, trained.values()))
        self._updates: list[Update | None] = []  # whose pieces are kept, by their places
        self._sources, self._of_weight = Sources(wary=True), tuple[Tensor, ...]()
        self._kept: dict[int, Tensor] = {}
        self._version, self._device = 0, one.left.device
        self._refused = math.inf  # updates, for which there was no room

    def is_of(self, like: Update) -> bool:
        """Whether the frozen tensors are those that the layer has now."""
        if not self._frozen:
            return True
        tensors = self._layer.tensors(like)
        return all(tensors.get(name) is piece for name, piece in self._frozen.items())

    def end(self) -> None:
        """Keep nothing, and let the parameters be as they were."""
        self._sources.end()
        self._updates, self._kept = [], {}

    def begin(self) -> None:
        """Look again whether there is room."""
        self._refused = math.inf

    def pieces(self, updates: Sequence[Update]) -> tuple[Pieces, int | None]:
        """Return the pieces of these updates in this order, and a number that is the same as long as they are."""
        n = len(updates)
        self.unfit |= not self.is_of(updates[0])
        if n == 1 and not self._computed:  # one alone is no copy at all
            return self._with({k: values_of(piece)[None] for k, piece in self._pieces_of(updates[0]).items()}), None
        of_weight = self._layer.base().seen() if self.by_ratio else ()
        if of_weight is None or not self._has_room(n):
            made = [self._pieces_of(update) for update in updates]
            of_all = {} if self.unfit else {k: torch.stack([of[k] for of in made]) for k in self._shapes}
            return self._with(of_all), None
        stale = self._stale(updates, of_weight)
        if stale:
            self._renew(updates, stale)
            self._of_weight = tuple(of_weight)
        return self._with({k: kept[:n] for k, kept in self._kept.items()}), self._version

    def placed(self, updates: Sequence[Update], start: int = 0) -> list[int]:
        """Return the order in which updates, laid side by side from a place on, are where they are kept already."""
        there = {update: i for i, update in enumerate(self._updates[start : start + len(updates)])}
        places = [there.get(update) for update in updates]
        order = {place: i for i, place in enumerate(places) if place is not None}
        others = iter([i for i, place in enumerate(places) if place is None])
        return [order[place] if place in order else next(others) for place in range(len(updates))]

    def _has_room(self, count: int) -> bool:
        there = len(next(iter(self._kept.values()))) if self._kept else 0
        if count > there and count < self._refused and not has_room(self._device, 2 * count * self._bytes):
            self._refused = count
        return count <= there or count < self._refused

    def _stale(self, updates: Sequence[Update], of_weight: Sequence[Tensor]) -> list[int]:
        """Return the places where an update's pieces are not those that are kept."""
        n, there, each = len(updates), self._updates, len(self._names)
        if n < len(there):
            self._cut(n)
        if len(of_weight) != len(self._of_weight) or not all(map(operator.is_, of_weight, self._of_weight)):
            return list(range(n))
        changed = self._sources.changed()
        if not changed and n == len(there) and all(map(operator.is_, updates, there)):
            return []
        stale = {place // each for place in changed}
        return [i for i, update in enumerate(updates) if i in stale or i >= len(there) or update is not there[i]]

    @torch.inference_mode(False)
    def _cut(self, count: int) -> None:
        """Keep the first pieces alone."""
        del self._updates[count:]
        self._sources.cut(count * len(self._names))
        self._kept = {k: kept[:count].clone() if _SPARE * count < len(kept) else kept for k, kept in self._kept.items()}

    @torch.inference_mode(False)  # what is kept may be written to later
    @torch.no_grad()
    def _renew(self, updates: Sequence[Update], stale: Sequence[int]) -> None:
        """Keep the pieces that the updates in these places have now."""
        each = len(self._names)
        for place in stale:
            # nobody's, should one of them fail
            self._updates[place : place + 1] = [None]
            for k, name in enumerate(self._names):
                self._sources.put(place * each + k, *updates[place].places()[name])
        made = [self._pieces_of(updates[place]) for place in stale]
        if self.unfit:
            return
        for k, piece in made[0].items():
            if k not in self._kept or len(self._kept[k]) < len(updates):
                self._kept[k] = _grown(self._kept.get(k), len(updates), piece)
            # the places that changed are written into what is there, since a batch of a hundred adapters of which one
            # trains would otherwise be laid side by side anew; the version tells who keeps something made of it
            copy_all([self._kept[k][place] for place in stale], [values_of(of[k]) for of in made])
        for place in stale:
            self._updates[place] = updates[place]
        self._version += 1

    def _pieces_of(self, update: Update) -> dict[int, Tensor]:
        """Return the pieces of an update that are not those of all."""
        if self._computed:
            pieces, _ = self._of(update)
            own = {k: piece for k, piece in enumerate(pieces) if piece is not None and self._shared[k] is None}
        else:
            own = {k: update.tensor(name) for k, name in self._trained.items()}
        self.unfit |= {k: piece.shape for k, piece in own.items()} != self._shapes
        return own

    def _with(self, own: Mapping[int, Tensor]) -> Pieces:
        return Pieces(*(own.get(k, piece) for k, piece in enumerate(self._shared)))  # type: ignore[arg-type]

    def _of(self, update: Update) -> tuple[Pieces, Core]:
        tensors = self._layer.tensors(update)
        factors, ratio = update.method.factors(tensors), update.ratio(tensors, self._layer.base())
        update.scale = factors.scale
        self.unfit |= ratio is not None and ratio.rows is not None
        values = None if ratio is None else ratio.values
        return Pieces(*factors[:2], getattr(factors.core, "values", None), values), factors.core

    def scale(self, update: Update) -> float:
        """Return s of an update."""
        if update.scale is None:
            self._of(update)
        return cast(float, update.scale)


def _grown(before: Tensor | None, count: int, piece: Tensor) -> Tensor:
    """Return memory for so many pieces, with those that there were in front."""
    # more than are needed, where a batch has begun to grow
    more = count if before is None else count + count // 4
    tall = piece.dim() == 2 and piece.shape[0] > piece.shape[1]
    # L by columns, of which a product with one row each reads in the order in which they lie
    kept = piece.new_empty(more, *piece.shape[::-1]).mT if tall else piece.new_empty(more, *piece.shape)
    if before is not None:
        kept[: len(before)] = before
    return kept

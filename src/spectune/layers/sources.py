"""Tensors that something was made of, and whether they are what they were then."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple
from weakref import finalize

import torch
import torch.nn as nn

from spectune.layers.values import requests, unwatch, watch
from spectune.private import is_shared

Held = dict[str, "nn.Parameter | None"]


class Sources:
    """Parameters, where modules hold them; they are watched (`Watched`) until `end`.

    Args:
        wary: look at a parameter as one that may be written to unseen as long as anything else holds its memory.
            Otherwise what was made of its memory before it is noted is taken to be nobody's.
    """

    def __init__(self, wary: bool = False) -> None:
        self._wary = wary
        self._held: list[Held] = []
        self._keys: list[str] = []
        # a list for each thing that is compared, since a loop in C over each is what every token can afford
        self._tensors: list[nn.Parameter | None] = []
        self._versions: list[int] = []
        self._pointers: list[int] = []
        self._marks: list[Marks] = []
        self._unsure: set[int] = set()  # places of which it is not known that nothing was written there
        self._requests = -1
        self._watched: dict[int, nn.Parameter] = {}
        finalize(self, _unwatch_all, self._watched).atexit = False

    def put(self, place: int, held: Held, key: str) -> None:
        """Take what a module holds by a key for the source at a place, the next one or one that is there; note it."""
        if place == len(self._held):
            self._held.append(held)
            self._keys.append(key)
            self._tensors.append(None)
            self._versions.append(0)
            self._pointers.append(0)
            self._marks.append(Marks())
        self._held[place], self._keys[place] = held, key
        self.note(place)

    def cut(self, count: int) -> None:
        """Keep the first sources alone."""
        gone = self._tensors[count:]
        for column in (self._held, self._keys, self._tensors, self._versions, self._pointers, self._marks):
            del column[count:]
        self._unsure = {place for place in self._unsure if place < count}
        for tensor in gone:
            self._release(tensor)

    def note(self, place: int) -> None:
        """Take the values that are there now for those that something is made of."""
        before, tensor = self._tensors[place], self._held[place].get(self._keys[place])
        if tensor is not None and watch(tensor):
            self._watched[id(tensor)] = tensor
        self._tensors[place] = tensor
        if before is not tensor:
            self._release(before)
        self._unsure.add(place)
        if tensor is None:
            return
        self._versions[place], self._pointers[place] = _version_of(tensor), tensor.data_ptr()
        self._marks[place] = marks = Marks.of(tensor)
        if (
            marks.number
            and not marks.asked
            and not (_may_be_written(tensor) if self._wary else getattr(tensor, "is_lent", True))
        ):
            self._unsure.discard(place)

    def changed(self) -> Sequence[int]:
        """Return the places of what is another than it was, or may be, until it is noted again."""
        if (
            not self._unsure
            and self._requests == requests()
            and all(map(operator.is_, map(dict.get, self._held, self._keys), self._tensors))
            and [t._version for t in self._tensors] == self._versions  # type: ignore[union-attr]
            and [t.data_ptr() for t in self._tensors] == self._pointers  # type: ignore[union-attr]
        ):
            return ()
        self._requests = requests()
        self._unsure.update(place for place in range(len(self._tensors)) if not self.is_same(place))
        return sorted(self._unsure)

    def is_same(self, place: int, *, but_lent: bool = False) -> bool:
        """Whether a source is what it was; `but_lent` leaves aside that somebody was lent its memory meanwhile."""
        tensor, marks = self._tensors[place], self._marks[place]
        if tensor is None or self._held[place].get(self._keys[place]) is not tensor:
            return False
        now = Marks.of(tensor)
        return (
            now.number == marks.number  # watched without a break
            and _version_of(tensor) == self._versions[place]
            and tensor.data_ptr() == self._pointers[place]
            and now.asked == marks.asked
            and (but_lent or now.lent == marks.lent)
        )

    def is_hidden(self, place: int) -> bool:
        """Whether writes go unnoticed: whoever asked for `data` may write there as long as the parameter is there."""
        marks = Marks.of(self._tensors[place])
        return not marks.number or marks.asked > 0

    def end(self) -> None:
        """Let the parameters be as they were."""
        self.cut(0)

    def _release(self, tensor: nn.Parameter | None) -> None:
        """Watch a parameter no longer that is at no place any more."""
        if id(tensor) in self._watched and not any(t is tensor for t in self._tensors):
            unwatch(self._watched.pop(id(tensor)))


class Marks(NamedTuple):
    """What a watched parameter counts; zero where it is not watched."""

    number: int = 0
    asked: int = 0
    lent: int = 0

    @classmethod
    def of(cls, tensor: object) -> Marks:
        # with a default, since another thread may let it be as it was at any time
        return cls(getattr(tensor, "number", 0), getattr(tensor, "asked", 0), getattr(tensor, "lent", 0))


def _version_of(tensor: nn.Parameter) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _may_be_written(tensor: nn.Parameter) -> bool:
    """Whether something may write to a parameter's memory unseen: another tensor or array, or another process."""
    if is_shared(tensor) or (tensor.device.type == "cpu" and tensor.untyped_storage().is_shared()):
        return True
    # c10d's collectives count no version
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _unwatch_all(parameters: dict[int, nn.Parameter]) -> None:
    for parameter in parameters.values():
        unwatch(parameter)
    parameters.clear()

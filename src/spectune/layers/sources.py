"""Tensors that something was made of, and whether they are what they were then."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from weakref import finalize

import torch.nn as nn

from spectune.layers.values import Watched, requests, unwatch, watch
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
        self._marks: list[tuple[int, int]] = []
        self._unsure: set[int] = set()
        self._requests = -1
        self._watched: list[nn.Parameter] = []
        self._finish = finalize(self, _unwatch_all, self._watched)
        self._finish.atexit = False

    def put(self, place: int, held: Held, key: str) -> None:
        """Take what a module holds by a key for the source at a place, the next one or one that is there; note it."""
        if place == len(self._held):
            self._held.append(held)
            self._keys.append(key)
            self._tensors.append(None)
            self._versions.append(0)
            self._pointers.append(0)
            self._marks.append((0, 0))
        self._held[place], self._keys[place] = held, key
        self.note(place)

    def cut(self, count: int) -> None:
        """Keep the first sources alone."""
        for column in (self._held, self._keys, self._tensors, self._versions, self._pointers, self._marks):
            del column[count:]
        self._unsure = {place for place in self._unsure if place < count}

    def note(self, place: int) -> None:
        """Take the values that are there now for those that something is made of."""
        tensor = self._held[place].get(self._keys[place])
        if tensor is not None and watch(tensor):
            self._watched.append(tensor)
        self._tensors[place] = tensor
        self._unsure.add(place)
        if isinstance(tensor, Watched):
            self._versions[place], self._pointers[place] = tensor._version, tensor.data_ptr()
            self._marks[place] = tensor.asked, tensor.lent
            if not tensor.asked and not (is_shared(tensor) if self._wary else tensor.is_lent):
                self._unsure.discard(place)

    def changed(self) -> Sequence[int]:
        """Return the places of what is another than it was, or may be."""
        tensors = self._tensors
        if (
            not self._unsure
            and self._requests == requests()
            and all(map(operator.is_, map(dict.get, self._held, self._keys), tensors))
            and [t._version for t in tensors if t is not None] == self._versions
            and [t.data_ptr() for t in tensors if t is not None] == self._pointers
        ):
            return ()
        self._requests = requests()
        return [place for place in range(len(tensors)) if place in self._unsure or not self.is_same(place)]

    def is_same(self, place: int, *, but_lent: bool = False) -> bool:
        """Whether a source is what it was; `but_lent` leaves aside that somebody was lent its memory meanwhile."""
        tensor = self._tensors[place]
        return (
            isinstance(tensor, Watched)  # still, where a context around this one ended
            and self._held[place].get(self._keys[place]) is tensor
            and tensor._version == self._versions[place]
            and tensor.data_ptr() == self._pointers[place]
            and tensor.asked == self._marks[place][0]
            and (but_lent or tensor.lent == self._marks[place][1])
        )

    def is_hidden(self, place: int) -> bool:
        """Whether writes go unnoticed: whoever asked for `data` may write there as long as the parameter is there."""
        tensor = self._tensors[place]
        return not isinstance(tensor, Watched) or tensor.asked > 0

    def end(self) -> None:
        """Let the parameters be as they were."""
        self._finish()
        self.cut(0)


def _unwatch_all(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        unwatch(parameter)
    parameters.clear()

"""Tensors of a checkpoint, not yet read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Stored(NamedTuple):
    """A tensor in a file.

    Args:
        name: in the checkpoint.
        shape: as stored.
        dtype: as the file calls it.
        floating: its bytes are values, or can be made so.
        read: returns it, or one matrix of a stack of three dimensions, given the index.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[int | None], Tensor]


class Unpacked(NamedTuple):
    """A tensor as its values, and the names of the tensors beside it that these are made of."""

    stored: Stored
    used: tuple[str, ...]

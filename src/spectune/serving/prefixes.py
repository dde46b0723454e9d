"""Keys and values of texts that were read before, by the mixture that read them, so that nobody reads them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 16  # tokens that are kept or let go of together

Read = Callable[[int, int], list[Tensor]]  # keys and values (heads x tokens x features) from one token to another


class Block(NamedTuple):
    """The keys and values of some tokens of a text.

    Args:
        number: of the block, which stands for all of the text up to its end.
        tensors: keys and values of each layer (heads x tokens x features).
        bytes: of the tensors.
    """

    number: int
    tensors: list[Tensor]
    bytes: int


class Prefixes:
    """Beginnings of texts, as chains of blocks that end where no text went on alike.

    A block is known by the one before it and its own tokens, and the first of a text by what read it, so that an
    adapter's keys never serve another one, nor the same one with another weight.

    Args:
        most_bytes: of keys and values; what was not used for the longest goes first.

    Attributes:
        hits: tokens that need not be read again, so far.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes, self.hits = most_bytes, 0, 0
        self._blocks: OrderedDict[tuple[Hashable, tuple[int, ...]], Block] = OrderedDict()
        self._numbers = count()

    def find(self, origin: Hashable, tokens: Sequence[int]) -> list[Block]:
        """Return the blocks with which a text begins, all but its last token at most.

        Args:
            origin: what reads it.
            tokens: the text.
        """
        found: list[Block] = []
        keys = []
        before: Hashable = origin
        for begin in range(0, len(tokens) - BLOCK, BLOCK):
            key = before, tuple(tokens[begin : begin + BLOCK])
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
            keys.append(key)
            before = block.number
        self._touch(keys)
        return found

    def keep(self, origin: Hashable, tokens: Sequence[int], read: Read) -> None:
        """Keep what was read of a text.

        Args:
            origin: what read it.
            tokens: the text.
            read: returns the keys and values of some of its tokens.
        """
        before: Hashable = origin
        keys = []
        for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = before, tuple(tokens[begin : begin + BLOCK])
            block = self._blocks.get(key)
            if block is None:
                tensors = [tensor.clone() for tensor in read(begin, begin + BLOCK)]
                block = Block(next(self._numbers), tensors, sum(tensor.nbytes for tensor in tensors))
                if block.bytes > self.most_bytes:
                    return
                self._blocks[key] = block
                self.bytes += block.bytes
            keys.append(key)
            before = block.number
        self._touch(keys)
        while self.bytes > self.most_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].bytes

    def _touch(self, keys: Sequence[tuple[Hashable, tuple[int, ...]]]) -> None:
        for key in reversed(keys):  # the beginning last: without it the rest of a text would be of no use
            self._blocks.move_to_end(key)

    def forget(self, origins: Callable[[object], bool]) -> None:
        """Let go of texts that were read by what will not read again.

        Args:
            origins: whether an origin is one of these.
        """
        gone: set[Hashable] = set()
        for key, block in sorted(self._blocks.items(), key=lambda item: item[1].number):  # beginnings first
            before = key[0]
            if before in gone or (not isinstance(before, int) and origins(before)):
                gone.add(block.number)
                self.bytes -= self._blocks.pop(key).bytes


def origin_of(mixture: Mapping[Any, Any]) -> Hashable:
    """Return what stands for adapters with their weights, and no other adapters or weights."""
    return frozenset((who, _fixed(weight)) for who, weight in mixture.items())


def mentions(gone: Collection[object]) -> Callable[[Any], bool]:
    """Return whether an origin has one of some adapters."""
    return lambda origin: any(who in gone for who, _ in origin)


def _fixed(weight: Any) -> Hashable:
    if isinstance(weight, Mapping):
        return frozenset((layer, float(w)) for layer, w in weight.items())
    return float(weight)


def laid_out(beginnings: Iterable[Sequence[Block]], lengths: Sequence[int], width: int) -> list[Tensor]:
    """Return keys and values (rows x heads x width x features) of beginnings that end at the last column.

    Args:
        beginnings: the blocks of each row.
        lengths: how many of its tokens each row takes.
        width: columns.
    """
    rows = list(beginnings)
    like = next(blocks for blocks in rows if blocks)[0].tensors
    made = [t.new_zeros(len(rows), t.shape[0], width, t.shape[2]) for t in like]
    for row, (blocks, length) in enumerate(zip(rows, lengths, strict=True)):
        if not length:
            continue
        for k, tensor in enumerate(made):
            tensor[row, :, width - length :] = torch.cat([block.tensors[k] for block in blocks], dim=1)[:, :length]
    return made

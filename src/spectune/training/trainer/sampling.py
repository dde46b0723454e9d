"""The order of examples over several processes, none twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

BLANK = "blank"  # in a batch that counts for nothing, because other processes have the last examples


class Examples(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...


class Order(Protocol):
    """A sampler of PyTorch that knows its length and takes a generator."""

    generator: torch.Generator | None

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...


class EvenSampler(Sampler[int]):
    """Follow a sampler, drawing the same in every process, and fill up the last batches with blanks.

    The examples of an optimizer step are then those that one process would take, and none is taken twice.

    Args:
        sampler: of the data set.
        multiple: examples in a forward pass of all processes.
        seed: of the sampler, with the epoch's number added as accelerate does.
    """

    def __init__(self, sampler: Order, multiple: int, seed: int = 0) -> None:
        self._sampler, self._multiple, self._seed, self._epoch = sampler, multiple, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of passes over the data so far."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._multiple) * self._multiple

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from self._sampler
        yield from [len(self._sampler)] * (len(self) - len(self._sampler))


class WithBlanks(Dataset[object]):
    """Examples, and None behind the last."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> object:
        return self.examples[index] if index < len(self.examples) else None


class BlankCollator:
    """Leave blanks out of a batch; a batch of nothing else is made of a stand-in and marked.

    Args:
        collator: makes a batch of examples.
        stand_in: any example.
    """

    def __init__(self, collator: Callable[[Sequence[object]], dict[str, Tensor | bool]], stand_in: object) -> None:
        self._collator, self._stand_in = collator, stand_in

    def __call__(self, examples: Sequence[object]) -> dict[str, Tensor | bool]:
        present = [example for example in examples if example is not None]
        return self._collator(present) if present else {**self._collator([self._stand_in]), BLANK: True}

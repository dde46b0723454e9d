"""Records that lie in a file, for data that memory cannot hold: of each, memory keeps where it begins and a digest."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from spectune.errors import SpectuneError
from spectune.home import temporary_file
from spectune.training.data.rows import Record, Row, same

Numbers = npt.NDArray[np.int64]


class Spool:
    """A file of records, which goes when nothing refers to it any more."""

    def __init__(self) -> None:
        self._file = temporary_file(self)
        self._starts, self._digests, self._weights = array("q", [0]), array("Q"), array("d")

    def __len__(self) -> int:
        return len(self._digests)

    def append(self, row: Row) -> None:
        """Add a record.

        Raises:
            SpectuneError: it has a value that JSON cannot hold.
        """
        try:
            text = json.dumps([row, row.where, row.plain], ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise SpectuneError(f"{row.where}: streaming keeps records as JSON, and {error}") from None
        self._file.write(text)
        self._starts.append(self._starts[-1] + len(text))
        self._digests.append(int(same(row)[:16], 16))
        self._weights.append(row.weight)

    def row(self, number: int) -> Row:
        """Return a record."""
        self._file.seek(self._starts[number])
        values, where, plain = json.loads(self._file.read(self._starts[number + 1] - self._starts[number]))
        row = Row(values, where, plain)
        row.weight = self._weights[number]
        return row

    def digests(self, numbers: Numbers) -> npt.NDArray[np.uint64]:
        """Return of each record what those that teach the same have alike."""
        return np.frombuffer(self._digests, np.uint64)[numbers]

    def weights(self, numbers: Numbers) -> npt.NDArray[np.float64]:
        """Return how often each record is taken."""
        return np.frombuffer(self._weights, np.float64)[numbers]

    def all(self) -> Spooled:
        """Return all records, when none is added any more."""
        self._file.flush()
        return Spooled(self, np.arange(len(self), dtype=np.int64))


class Spooled(Sequence[Record]):
    """Records of a spool, by their numbers.

    Args:
        spool: which holds them.
        numbers: of these, in order.
    """

    def __init__(self, spool: Spool, numbers: Numbers) -> None:
        self._spool, self._numbers = spool, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Spooled: ...
    def __getitem__(self, index: int | slice) -> Record | Spooled:
        if isinstance(index, slice):
            return Spooled(self._spool, self._numbers[index])
        return self._spool.row(int(self._numbers[index]))

    def digests(self) -> npt.NDArray[np.uint64]:
        """Return of each record what those that teach the same have alike."""
        return self._spool.digests(self._numbers)

    def parted(self, wanted: int, seed: int) -> tuple[Spooled, Spooled]:
        """Return the records but for about as many as are wanted, and these; all copies of one are on one side.

        Which they are follows from what they are and from the seed, and not from where they stand.
        """
        kinds, counts = np.unique(self.digests(), return_counts=True)
        mixed = [hashlib.sha256(f"{seed} {kind}".encode()).digest()[:8] for kind in kinds.tolist()]
        order = np.argsort(np.frombuffer(b"".join(mixed), np.uint64), kind="stable")
        enough = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
        held = np.isin(self.digests(), kinds[order[: min(enough, len(kinds) - 1)]])
        return Spooled(self._spool, self._numbers[~held]), Spooled(self._spool, self._numbers[held])

    def repeated(self, seed: int) -> Spooled:
        """Return records as often as their weights say; what is left of a weight is drawn by the seed."""
        weights = self._spool.weights(self._numbers)
        if bool((weights == 1).all()):
            return self
        draws = random.Random(seed)
        often = [int(weight) + (draws.random() < weight % 1) for weight in weights.tolist()]
        return Spooled(self._spool, np.repeat(self._numbers, often))

"""Examples held compactly, and found again when the same records meet the same tokenizer.

An entry is one safetensors file, named by a digest of the records, of the tokenizer with its chat template, and of what
was asked for, so that none is ever out of date.  It is mapped into memory and not read, and holds a checksum that is
compared first; one that fails is made anew.  $SPECTUNE_CACHE moves the folder or turns the cache off, as for
decompositions; the few entries used last are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, overload

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from spectune.home import cache_dir, temporary_file
from spectune.reading import open_tensors
from spectune.spectral import cache
from spectune.storage import bytes_of, save_tensors, temporary_beside
from spectune.training.data.encoding import Encoder, Example
from spectune.training.data.records import Record

if TYPE_CHECKING:
    from spectune.bases.tokens import Asking

VERSION = "1"  # of what is made of records: raised whenever an example of any record changes
_WORTH = 2000  # records; fewer are tokenized in less time than a file is worth
_KEPT = 8  # entries
_TENSORS = ("tokens", "supervised", "ends", "begins", "records")
_IN_MEMORY = 1 << 24  # values that are held before they are written to a file
_LARGE = 1 << 27  # tokens; more are not written twice, once to go on with and once for the next run


class Store:
    """The examples of some records, at five bytes a token.

    Args:
        tensors: "tokens" (int32) and "supervised" (bool) of all examples, end to end; "ends" of the examples among
            them, where in each the first token "begins" that is learned (-1: none; the first token has nothing before
            it), and "records", the ends of the records among the examples.
        notes: what a user should know of the way they were made.
    """

    def __init__(self, tensors: dict[str, Tensor], notes: Sequence[str]) -> None:
        self._tensors, self.notes = tensors, tuple(notes)
        # with a zero in front, so that example n lies between entries n and n + 1 of it, the first one too
        self._ends = torch.cat([tensors["ends"].new_zeros(1), tensors["ends"]])

    @classmethod
    def of(cls, found: Iterable[Sequence[Example]], notes: Callable[[], Sequence[str]]) -> Store:
        """Return the examples of each record.

        Args:
            found: the examples of one record after the other.
            notes: asked for when all are there.
        """
        kept = {name: _Growing(kind) for name, kind in zip(_TENSORS, "ibqiq", strict=True)}
        count = 0
        for examples in found:
            for example in examples:
                kept["tokens"].add(example.tokens)
                kept["supervised"].add(example.supervised)
                kept["ends"].add([len(kept["tokens"])])
                kept["begins"].add([next((i for i, s in enumerate(example.supervised) if s and i), -1)])
            count += len(examples)
            kept["records"].add([count])
        tensors = {name: values.tensor() for name, values in kept.items()}
        tensors["supervised"] = tensors["supervised"].view(torch.bool)
        return cls(tensors, notes())

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self._ends[-1])

    def example(self, number: int, limit: int | None = None) -> Example:
        """Return one example, up to a limit of tokens."""
        start, end = self._ends[number : number + 2].tolist()
        part = slice(start, end if limit is None else min(end, start + limit))
        return Example(self._tensors["tokens"][part].tolist(), self._tensors["supervised"][part].tolist())

    def __iter__(self) -> Iterator[list[Example]]:
        """Yield the examples of each record."""
        start = 0
        for end in self._tensors["records"].tolist():
            yield [self.example(number) for number in range(start, end)]
            start = end

    def learned(self, limit: int) -> tuple[Kept, int, int]:
        """Return the examples that have something to learn within a limit of tokens, how many are cut, and left out."""
        # by numbers that are there, and not by a look at each example: of millions only those that a run needs are
        # ever made
        begins, lengths = self._tensors["begins"], self._ends.diff()
        kept = ((begins > 0) & (begins < limit)).nonzero().flatten()
        return Kept(self, kept, limit), int((lengths > limit).sum()), len(self) - len(kept)

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"checksum": _checksum(self._tensors), "notes": json.dumps(self.notes)}
        with temporary_beside(path) as temporary:
            save_tensors(self._tensors, temporary, about)
            os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Store | None:
        """Return what a file holds, or None where there is none, or one that is damaged."""
        try:
            with open_tensors(path) as opened:
                about = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in _TENSORS}
            if about.get("checksum") != _checksum(tensors):
                return None
            return cls(tensors, json.loads(about["notes"]))
        except (OSError, SafetensorError, ValueError, KeyError):
            return None


class _Growing:
    """Numbers that are added to, and go to a file when they are many.

    Args:
        kind: of the numbers, as `array` has it.
    """

    def __init__(self, kind: str) -> None:
        self._held, self._written = array(kind), 0
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self._written + len(self._held)

    def add(self, values: Sequence[int]) -> None:
        self._held.extend(values)
        if len(self._held) >= _IN_MEMORY:
            self._write()

    def _write(self) -> None:
        self._file = self._file or temporary_file(self)
        self._held.tofile(self._file)
        self._written += len(self._held)
        del self._held[:]

    def tensor(self) -> Tensor:
        """Return the numbers, in memory or mapped into it."""
        if self._file is None:
            return torch.from_numpy(np.array(self._held))
        self._write()
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, np.dtype(self._held.typecode), "c"))


class Kept(Sequence[Example]):
    """Some examples of a store, each up to a limit of tokens.

    Args:
        store: which holds them.
        numbers: of these.
        limit: tokens of one.
    """

    def __init__(self, store: Store, numbers: Tensor, limit: int) -> None:
        self._store, self._numbers, self._limit = store, numbers, limit

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._store.example(number, self._limit) for number in self._numbers.tolist()[index]]
        return self._store.example(int(self._numbers[index]), self._limit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]  # as of a list


def stored(
    encoder: Encoder,
    records: Sequence[Record],
    what: str,
    ask: Callable[[Record], Asking[list[Example]]],
) -> Store:
    """Return the examples of records, from the cache where they were made before.

    Args:
        encoder: makes them.
        records: of which.
        what: is asked for, by a name that says all that `ask` depends on beside the record and the encoder.
        ask: for the examples of one record.

    Raises:
        SpectuneError: a record of which no example can be made.
    """
    folder = cache.directory()
    path = None
    if folder is not None and len(records) >= _WORTH:
        place = folder if os.environ.get("SPECTUNE_CACHE") else cache_dir()
        key = _key(encoder, records, what)
        path = None if key is None else place / "examples" / f"{key}.safetensors"
    found = None if path is None else Store.load(path)
    if found is not None and path is not None:
        with suppress(OSError):  # a read-only cache
            os.utime(path)
        return found
    found = Store.of(encoder.of_all(records, ask), encoder.notes)
    if path is not None and found.tokens < _LARGE:
        with suppress(OSError):  # a cache that is full or read-only: what is there is as it was
            found.save(path)
            _prune(path.parent)
    return found


def _prune(folder: Path) -> None:
    entries = sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)
    for path in entries[_KEPT:]:
        path.unlink(missing_ok=True)


def _key(encoder: Encoder, records: Iterable[Record], what: str) -> str | None:
    """Return a digest of all that examples depend on, None where a tokenizer cannot say what it is."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    tokenizer = encoder.tokenizer
    about = [VERSION, what, encoder.ends, type(tokenizer).__name__, tokenizer.chat_template, backend.to_str()]
    about += [{key: str(value) for key, value in tokenizer.special_tokens_map.items()}]
    about += [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "padding_side")]
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for record in records:
        said = [dict(record), getattr(record, "plain", None)]
        found.update(json.dumps(said, sort_keys=True, default=str).encode(errors="surrogatepass"))
    return found.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in _TENSORS:
        found.update(bytes_of(tensors[name]))
        found.update(str(tuple(tensors[name].shape)).encode())
    return found.hexdigest()

"""One record, which knows where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spectune.errors import SpectuneError

Record = Mapping[str, Any]  # one line of data, read from JSON or a table
OF_TASKS = {"text", "label", "text_pair", "prompt", "completion", "messages", "chosen", "rejected", "tools"}


class Row(dict[str, object]):
    """A record that knows where it comes from.

    Args:
        values: its keys.
        where: file and line, for messages.
        plain: the same as a text prompt and completion, for tokenizers without a chat template.
        weight: how often it is taken, where others are taken once.
    """

    def __init__(self, values: Mapping[str, object], where: str, plain: Mapping[str, str] | None = None) -> None:
        super().__init__(values)
        self.where, self.plain, self.weight = where, plain, 1.0
        self.same: str | None = None  # as `same` has it, once it was asked for


@contextmanager
def of(record: Record, where: str | None = None) -> Iterator[None]:
    """Within the context, a `SpectuneError` says which record it is about, and where that is."""
    try:
        yield
    except SpectuneError as error:
        where = where or getattr(record, "where", None)
        raise (SpectuneError(f"{where}: {error}") if where else error) from None


def same(record: Record) -> str:
    """Return what two records have alike that teach the same."""
    known = getattr(record, "same", None)
    if known is not None:
        return known
    kept = {key: value for key, value in record.items() if key in OF_TASKS} or dict(record)
    text = json.dumps(kept, sort_keys=True, default=str)
    found = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    if isinstance(record, Row):
        record.same = found
    return found

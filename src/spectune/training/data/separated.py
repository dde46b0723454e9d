"""Rows of a table of fields with something between them: CSV, TSV and what spreadsheets make of them."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from spectune.errors import SpectuneError
from spectune.reading import RECORD_BYTES
from spectune.training.data.json_rows import Rows

_QUOTES = "a field that begins with a quote ends with one, and quotes inside it are doubled"


def separated(path: Path, lines: Iterator[str], delimiter: str | None, say: Callable[[str], None]) -> Rows:
    """Yield the rows of a table, every field as the text that it is: neither 007 nor None means anything else."""
    csv.field_size_limit(RECORD_BYTES)  # the default is 128 KiB
    head, above = next(lines, ""), 0
    said = re.fullmatch(r"sep=(.)\s*", head)  # as Excel writes it
    if said is not None:
        delimiter, head, above = said[1], next(lines, ""), 1
    outside = re.sub(r'"[^"]*"', "", head)
    delimiter = delimiter or max(",;\t|", key=outside.count)
    reader = csv.DictReader(chain([head], lines), strict=True, delimiter=delimiter)
    number, end = 0, 0  # of rows, and of lines of them
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
        if twice:
            raise SpectuneError(f"{path}: two columns are named {twice[0]!r}, and only one of them would be read")
        look, end = _Columns(path, names, delimiter, say), reader.line_num
        for number, row in enumerate(reader, start=1):
            where, end = f"{path}, row {number}", reader.line_num
            yield look.row(row, where), where
    except csv.Error as error:
        begin = f"row {number + 1}, which begins in line {end + above + 1}" if end else "the first line"
        raise SpectuneError(f"cannot read {path}, {begin}: it is not CSV ({error}); {_QUOTES}") from None


class _Columns:
    """Looks at the rows of a table, whether they are what its first line says.

    Args:
        path: of the file.
        names: that the first line has.
        delimiter: between fields.
        say: told, once each, of what was taken for names or has none.
    """

    def __init__(self, path: Path, names: list[str], delimiter: str, say: Callable[[str], None]) -> None:
        self._path, self._delimiter, self._say = path, delimiter, say
        self._count, self._names = len(names), [name for name in names if name]
        self._told = set[str]()

    def row(self, row: dict[Any, Any], where: str) -> dict[str, str]:
        """Return the fields of a row by the names that there are.

        Raises:
            SpectuneError: they are others, the names again, or several rows in one.
        """
        more = row.pop(None, [])
        if any(more) or (None in row.values() and any(row.values())):
            self._refuse(self._count + len(more) if more else sum(v is not None for v in row.values()), where)
        unnamed = row.pop("", None)  # numbers of rows, or behind a last delimiter
        if unnamed and not unnamed.strip().isdecimal():
            what = f"is not read, for it has no name in the first line; in {where} it holds {unnamed!r:.60}"
            self._tell("unnamed", f"a column of {self._path} {what}")
        for name in self._names:
            field = row[name] = row[name] or ""  # a line of fewer delimiters, which is empty
            if self._delimiter == "\t" and "\t" in field and "\n" in field:
                raise SpectuneError(
                    f"{where}: {name!r} goes on over the ends of rows, from one quote to the next; {_QUOTES}"
                )
            if field == name:
                self._repeats(row, name, where)
        return row

    def _refuse(self, count: int, where: str) -> None:
        quoted = "commas" if self._delimiter == "," else repr(self._delimiter)
        remedy = f"quote {quoted} in texts"
        if count < self._count:
            remedy = "quote texts with line ends in them, and leave empty what is missing"
        raise SpectuneError(
            f"{where}: has other columns than the first line ({count} for {self._count} names); {remedy}"
        )

    def _repeats(self, row: dict[Any, Any], name: str, where: str) -> None:
        if len(self._names) > 1 and all(row[each] == each for each in self._names):
            raise SpectuneError(f"{where}: has the names of the first line again: take it out")
        self._tell(
            "names",
            f"{where} has {name!r} in the column of that name: the first line was taken for names; if it is a record, "
            "write a line of names above it",
        )

    def _tell(self, kind: str, note: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._say(note)

"""Rows of files and data sets, as they stand: JSON, JSONL, CSV, TSV, Parquet, Arrow, packed or not, folders, globs."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path

from spectune.errors import SpectuneError, nearest
from spectune.reading import DOCUMENT_BYTES, check_file
from spectune.training.data.data_sets import data_set_rows, stored_rows, table_rows
from spectune.training.data.json_rows import Rows, lines_of, list_of, numbered, object_of
from spectune.training.data.separated import separated
from spectune.training.data.streams import (
    PACKED,
    UTF8,
    encoding_of,
    opened,
    pieces_of,
    table_lines,
    text_lines,
    unpacking,
)

_PEEK = 512
_OTHERS = {  # what files under the name of data are instead
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or save it as CSV",
    b"version https://git-lfs": "is a pointer of Git LFS and not the data: get it by `git lfs pull`",
    b"<!DOCTYPE": "is a web page and not data: get the file itself",
    b"<html": "is a web page and not data: get the file itself",
    b"%PDF": "is a PDF and not data",
    b"SQLite format": "is a database: write out the records as JSON lines",
}
_BINARY = re.compile(rb"[\0-\x08\x0e-\x1a]")  # what no text has
_ARRAY = ("[{", "[\n", "[\r", "[ ")  # what an array begins with, whatever the file is named
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet", ".arrow")


def rows(source: str, config_name: str | None, split_name: str | None, say: Callable[[str], None]) -> Rows:
    """Yield the rows of a file, of several by a pattern, or of a split of a data set, each with where it is.

    Args:
        source: a file, a pattern with `*`, a data set's folder, or its id.
        config_name: of the data set, where it has several configurations.
        split_name: of the data set; train if not given.
        say: told what a user should know of the way it was read.

    Raises:
        SpectuneError: what cannot be read, with its line.
    """
    path = Path(source)
    if not path.exists() and any(c in source for c in "*?["):
        found = sorted(glob.glob(source, recursive=True))
        if not found:
            raise SpectuneError(f"cannot read {source}: no file is named so")
        for name in found:
            yield from rows(name, config_name, split_name, say)
        return
    if not path.is_dir() and (path.exists() or _suffix(path) in _SUFFIXES):
        if config_name is not None or split_name is not None:
            raise SpectuneError(f"{source} is a file; data_config, data_split and eval_split are for data sets")
        yield from _file(path, say)
        return
    if path.is_dir() and (path / "state.json").is_file():  # as datasets' save_to_disk has it
        yield from stored_rows(path)
        return
    yield from data_set_rows(source, config_name, split_name)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] in PACKED else suffixes[-1] if suffixes else ""


def _file(path: Path, say: Callable[[str], None]) -> Rows:
    suffix = _suffix(path)
    if not path.exists():
        beside = [name.name for name in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside)
        raise SpectuneError(f"cannot read {path}: no such file{hint}")
    check_file(path)
    if suffix in (".parquet", ".arrow") or _begins(path, b"PAR1"):
        yield from numbered(table_rows(path, suffix), str(path))
        return
    with unpacking(path), opened(path) as stream:
        begin = stream.peek(_PEEK)[:_PEEK]
        for magic, what in _OTHERS.items():
            if begin.startswith(magic):
                raise SpectuneError(f"{path} {what}")
        if begin[257:262] == b"ustar":
            raise SpectuneError(f"{path} is a tar archive: unpack it, and give the files in it")
        if begin and not any(begin):
            raise SpectuneError(f"{path} begins with zeros and no text: it was not written or copied to its end")
        encoding = encoding_of(begin)
        if encoding not in (UTF8, "utf-16", "utf-32"):
            say(f"{path} was read as {encoding}, for every other byte is zero")
        begins = begin.decode(encoding, "ignore").lstrip()[:2]
        if suffix in _TABLES:
            delimiter = "\t" if suffix == ".tsv" else None
            yield from separated(path, table_lines(path, stream, encoding, say), delimiter, say)
        elif begins in _ARRAY or (suffix == ".json" and begins[:1] == "["):
            yield from list_of(path, pieces_of(path, stream, encoding))
        elif suffix == ".json" and begins[:1] == "{":
            yield from object_of(path, text_lines(path, stream, encoding, DOCUMENT_BYTES), say)
        elif begins and begins[0] not in "{[" and suffix not in (*_LINES, ".json"):
            if encoding == UTF8 and _BINARY.search(begin):
                raise SpectuneError(f"{path} is binary, and of no known kind: write out the records as JSON lines")
            raise SpectuneError(
                f'{path} is plain text and holds no records: write each as a line of JSON, as {{"text": "..."}}, '
                "in a file named .jsonl"
            )
        else:
            yield from lines_of(path, text_lines(path, stream, encoding))


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:  # which reading it will say
        return False

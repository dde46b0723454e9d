"""Rows of files and data sets, as they stand: JSON, JSONL, CSV, TSV, Parquet, Arrow, packed or not, folders, globs."""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spectune.errors import SpectuneError, nearest, need
from spectune.reading import DOCUMENT_BYTES, RECORD_BYTES, RECORDS, check_file
from spectune.training.data.json_rows import Rows, lines_of, list_of, numbered, object_of

if TYPE_CHECKING:
    import datasets


# what gives the bytes of a packed file as they are read
_PACKED: dict[str, Callable[[BinaryIO, Path], Any]] = {
    ".gz": lambda file, path: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file, path: bz2.BZ2File(file),
    ".xz": lambda file, path: lzma.LZMAFile(file),  # noqa: SIM115 (whoever asks for it closes it)
    ".zst": lambda file, path: _zstd(file, path),
}
_UTF8, _PEEK = "utf-8-sig", 512
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_OTHERS = {  # what files under the name of data are instead
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or save it as CSV",
    b"version https://git-lfs": "is a pointer of Git LFS and not the data: get it by `git lfs pull`",
    b"<!DOCTYPE": "is a web page and not data: get the file itself",
    b"<html": "is a web page and not data: get the file itself",
    b"%PDF": "is a PDF and not data",
    b"SQLite format": "is a database: write out the records as JSON lines",
}
_QUOTES = "a field that begins with a quote ends with one, and quotes inside it are doubled"
_BINARY = re.compile(rb"[\0-\x08\x0e-\x1a]")  # what no text has
_ARRAY = ("[{", "[\n", "[\r", "[ ")  # what an array begins with, whatever the file is named
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet", ".arrow")
_BATCH = 64  # rows of a table that are in memory, of which each may be large where few bytes stand for many


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
        yield from _stored(path)
        return
    yield from _data_set(source, config_name, split_name)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] in _PACKED else suffixes[-1] if suffixes else ""


def _file(path: Path, say: Callable[[str], None]) -> Rows:
    suffix = _suffix(path)
    if not path.exists():
        beside = [name.name for name in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside)
        raise SpectuneError(f"cannot read {path}: no such file{hint}")
    check_file(path)
    if suffix in (".parquet", ".arrow") or _begins(path, b"PAR1"):
        yield from numbered(_table(path, suffix), str(path))
        return
    with _unpacking(path), _opened(path) as stream:
        begin = stream.peek(_PEEK)[:_PEEK]
        for magic, what in _OTHERS.items():
            if begin.startswith(magic):
                raise SpectuneError(f"{path} {what}")
        if begin[257:262] == b"ustar":
            raise SpectuneError(f"{path} is a tar archive: unpack it, and give the files in it")
        if begin and not any(begin):
            raise SpectuneError(f"{path} begins with zeros and no text: it was not written or copied to its end")
        encoding = _encoding(begin)
        if encoding not in (_UTF8, "utf-16", "utf-32"):
            say(f"{path} was read as {encoding}, for every other byte is zero")
        begins = begin.decode(encoding, "ignore").lstrip()[:2]
        if suffix in _TABLES:
            lines = _table_lines(path, stream, encoding, say)
            yield from _separated(path, lines, "\t" if suffix == ".tsv" else None, say)
        elif begins in _ARRAY or (suffix == ".json" and begins[:1] == "["):
            yield from list_of(path, _reader(path, stream, encoding))
        elif suffix == ".json" and begins[:1] == "{":
            yield from object_of(path, _lines(path, stream, encoding, DOCUMENT_BYTES), say)
        elif begins and begins[0] not in "{[" and suffix not in (*_LINES, ".json"):
            if encoding == _UTF8 and _BINARY.search(begin):
                raise SpectuneError(f"{path} is binary, and of no known kind: write out the records as JSON lines")
            raise SpectuneError(
                f'{path} is plain text and holds no records: write each as a line of JSON, as {{"text": "..."}}, '
                "in a file named .jsonl"
            )
        else:
            yield from lines_of(path, _lines(path, stream, encoding))


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:  # which reading it will say
        return False


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Within the context, what reading and unpacking a file raise is said in a sentence."""
    try:
        yield
    except OSError as error:
        raise SpectuneError(f"cannot read {path}: {error.strerror or error}") from None
    except SpectuneError:  # of a line, and a ValueError
        raise
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise SpectuneError(f"cannot unpack {path}: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Give a file's bytes, unpacked as they are read."""
    with path.open("rb") as file:
        begin = file.read(8)
        # by content alone: whoever fetches a file may unpack it, and leave it its name
        packing = next((suffix for magic, suffix in _MAGIC.items() if begin.startswith(magic)), None)
        unpack = None if packing is None else _PACKED[packing]
        file.seek(0)
        if unpack is None:
            yield file
            return
        with unpack(file, path) as unpacked:
            yield io.BufferedReader(unpacked)


def _reader(path: Path, stream: io.BufferedReader, encoding: str) -> Callable[[int], str]:
    """Return what gives the next so many bytes of a stream as text."""
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 1

    def read(size: int) -> str:
        nonlocal lines
        piece = stream.read(size)
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line = lines + piece[: error.start].count(b"\n")
            raise SpectuneError(f"{path}, line {line}: not valid JSON, for it is not UTF-8 ({error})") from None
        lines += text.count("\n")
        return text

    return read


def _lines(path: Path, stream: io.BufferedReader, encoding: str, most: int = RECORD_BYTES) -> Iterator[str]:
    """Yield the lines of a file, of which newlines alone are the ends."""
    if encoding != _UTF8:
        yield from _decoded(path, stream, encoding, "\n", most)
        return
    for number, line in enumerate(iter(lambda: stream.readline(most + 1), b""), start=1):
        _check_length(path, number, line, most)
        try:
            yield line.decode(encoding if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise SpectuneError(f"{path}, line {number}: not valid JSON, for it is not UTF-8 ({error})") from None


def _table_lines(path: Path, stream: io.BufferedReader, encoding: str, say: Callable[[str], None]) -> Iterator[str]:
    """Yield the lines of a table, which is Windows-1252 where it is not UTF-8."""
    for tried in (encoding, "cp1252") if encoding == _UTF8 else ():
        decoder = codecs.getincrementaldecoder(tried)()
        try:
            with _opened(path) as whole:
                for part in iter(lambda: whole.read(1 << 20), b""):
                    decoder.decode(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            if tried != _UTF8:
                raise SpectuneError(f"cannot read {path}: it is neither UTF-8 nor Windows-1252 ({error})") from None
            continue
        encoding = tried
        if tried != _UTF8:
            say(f"{path} is not UTF-8, and was read as Windows-1252 (cp1252)")
        break
    yield from _decoded(path, stream, encoding, "", RECORD_BYTES)


def _check_length(path: Path, number: int, line: bytes | str, most: int) -> None:
    if len(line) > most:
        raise SpectuneError(f"{path}, line {number}: has more than {most:,} bytes, and no more are read")


def _decoded(path: Path, stream: io.BufferedReader, encoding: str, newline: str, most: int) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding, newline=newline)
    try:
        for number, line in enumerate(iter(lambda: text.readline(most + 1), ""), start=1):
            _check_length(path, number, line, most)
            yield line
    except UnicodeError as error:  # zeros or a mark said an encoding, and the rest is none of it
        raise SpectuneError(f"cannot read {path} as {encoding}: {error}") from None
    finally:
        with suppress(ValueError):  # whoever opened the file has closed it already
            text.detach()


def _encoding(content: bytes) -> str:
    """Return the encoding that a mark at the beginning says, or that zeros between the letters do."""
    if content[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    begin = content[:200]
    for encoding, zeros in (("utf-16-le", begin[1::2]), ("utf-16-be", begin[::2])):
        if len(zeros) > 1 and zeros.count(0) > 0.8 * len(zeros):
            return encoding
    return _UTF8


def _zstd(file: BinaryIO, path: Path) -> object:
    pyarrow = need("pyarrow", f"reading {str(path)!r}")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


def _separated(path: Path, lines: Iterator[str], delimiter: str | None, say: Callable[[str], None]) -> Rows:
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


def _table(path: Path, suffix: str) -> Iterator[dict[str, object]]:
    datasets = need("datasets", f"reading {str(path)!r}")

    try:
        if suffix == ".arrow":
            yield from _named(datasets.Dataset.from_file(str(path)))
            return
        # not by datasets, which writes all of it to its cache first, however large what few bytes stand for
        file = need("pyarrow.parquet", "Parquet").ParquetFile(path)
        if file.metadata.num_rows > RECORDS:
            raise SpectuneError(f"{path} has {file.metadata.num_rows:,} rows, and at most {RECORDS:,} are read")
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
        batches = file.iter_batches(_BATCH)
        yield from _with_names(features, (row for batch in batches for row in batch.to_pylist()))
    except SpectuneError:
        raise
    except Exception as error:  # whatever the readers raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise SpectuneError(f"cannot read the data {str(path)!r}: {reason[:200]}") from None


def _stored(path: Path) -> Rows:
    datasets = need("datasets", f"reading {str(path)!r}")

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise SpectuneError(f"cannot read the data {str(path)!r}: {' '.join(str(error).split())[:200]}") from None
    yield from numbered(_named(table), str(path))


def _data_set(source: str, config_name: str | None, split_name: str | None) -> Rows:
    """Yield what datasets.load_dataset reads, with the names of labels for their numbers."""
    datasets = need("datasets", f"reading {source!r}")

    try:
        table = datasets.load_dataset(source, name=config_name, split=split_name or "train")
    except Exception as error:  # whatever the many readers raise
        reason = " ".join(str(error.__cause__ or error).split())
        hint = ""
        if not os.path.exists(source):
            parent = Path(source).parent
            hint = nearest(Path(source).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
        raise SpectuneError(f"cannot read the data {source!r}: {reason[:200]}{hint}") from None
    yield from numbered(_named(table), source)


def _named(table: datasets.Dataset) -> Iterator[dict[str, object]]:
    yield from _with_names(table.features, map(dict, table))


def _with_names(features: datasets.Features, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    import datasets  # there already, where there is a table of its

    names = {k: f for k, f in features.items() if isinstance(f, datasets.ClassLabel)}
    several = {k: inner for k, f in features.items() if isinstance(inner := _inside(f), datasets.ClassLabel)}
    of_kind = {k: str(getattr(f, "dtype", "")) for k, f in features.items()}
    numbers = [k for k, kind in of_kind.items() if kind.startswith("decimal")]
    texts = [k for k, kind in of_kind.items() if kind in ("binary", "large_binary")]
    for row in rows:  # what has no label has -1
        row |= {k: float(row[k]) for k in numbers if row[k] is not None}
        row |= {k: _text(row[k]) for k in texts}
        row |= {k: f.int2str(row[k]) for k, f in names.items() if row[k] is not None and row[k] >= 0}
        yield row | {k: [f.int2str(n) for n in row[k]] for k, f in several.items() if row[k] is not None}


def _text(value: object) -> object:
    """Return the text that bytes are, as some programs write it; other bytes as they are."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _inside(feature: object) -> object:
    """Return what a column of lists holds lists of; datasets has had three ways to say so."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return getattr(feature, "feature", None)

"""Rows of files and data sets, as they stand: JSON, JSONL, CSV, TSV, Parquet, Arrow, packed or not, folders, globs."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.errors import SpectuneError, nearest, need

if TYPE_CHECKING:
    import datasets


_PACKED: dict[str, Callable[[Path], bytes]] = {
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".bz2": lambda path: bz2.decompress(path.read_bytes()),
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".zst": lambda path: _zstd(path),
}
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet", ".arrow")
_AROUND = ("data", "train", "rows", "examples", "records", "instances")  # the key of a list of records
Rows = Iterator[tuple[Any, str]]  # each with where it is, for messages


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
    if suffix in (".parquet", ".arrow"):
        yield from _numbered(_table(path, suffix), str(path))
        return
    text = _text(path, say, suffix in _TABLES)
    if suffix in _TABLES:
        yield from _separated(path, text, "\t" if suffix == ".tsv" else None)
    elif suffix == ".json" and text.lstrip()[:1] in "[{" and not _is_lines(text):
        yield from _array(path, text)
    else:
        yield from _json_lines(path, text)


def _text(path: Path, say: Callable[[str], None], guess: bool) -> str:
    """Return the text of a file, unpacked, in the encoding that it has."""
    try:
        packed = _PACKED.get(path.suffix.lower())
        content = path.read_bytes() if packed is None else packed(path)
    except OSError as error:
        raise SpectuneError(f"cannot read {path}: {error.strerror or error}") from None
    except SpectuneError:  # a package that is not there, and a ValueError
        raise
    except (EOFError, ValueError, lzma.LZMAError) as error:
        raise SpectuneError(f"cannot unpack {path}: {error}") from None
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if not guess:
            line = content[: error.start].count(b"\n") + 1
            raise SpectuneError(f"{path}, line {line}: not valid JSON, for it is not UTF-8 ({error})") from None
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise SpectuneError(f"cannot read {path}: it is neither UTF-8 ({error}) nor Windows-1252") from None
        say(f"{path} is not UTF-8, and was read as Windows-1252 (cp1252)")
        return text


def _zstd(path: Path) -> bytes:
    pyarrow = need("pyarrow", f"reading {str(path)!r}")

    with pyarrow.OSFile(str(path)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
        return stream.read()


def _is_lines(text: str) -> bool:
    """Whether a file of JSON holds one object a line, as many that are named .json do."""
    lines = [line for line in text.split("\n", 2)[:2] if line.strip()]
    if len(lines) < 2 or not lines[0].lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except ValueError:
        return False


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Twice(f"the key {twice!r} is there twice, and only one of them would be read")
    return found


class _Twice(ValueError):
    """A key of an object is there twice."""


def _json_lines(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except _Twice as error:
            raise SpectuneError(f"{path}, line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise SpectuneError(f"{path}, line {number}: not valid JSON ({error})") from None
        yield record, f"{path}, line {number}"


def _array(path: Path, text: str) -> Rows:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise SpectuneError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SpectuneError(f"{path}: not valid JSON ({error})") from None
    if isinstance(found, dict):  # one record, or an object around all of them
        inner = next((found[key] for key in _AROUND if isinstance(found.get(key), list) and found[key]), None)
        found = inner if inner is not None and isinstance(inner[0], dict) else [found]
    yield from _numbered(found, str(path))


def _numbered(found: Iterable[object], name: str) -> Rows:
    for number, row in enumerate(found, start=1):
        yield row, f"{name}, row {number}"


def _separated(path: Path, text: str, delimiter: str | None) -> Rows:
    """Yield the rows of a table, every field as the text that it is: neither 007 nor None means anything else."""
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB
    head = text.partition("\n")[0]
    delimiter = delimiter or max(",;\t|", key=head.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        names = reader.fieldnames or []
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise SpectuneError(f"{path}: two columns are named {twice[0]!r}, and only one of them would be read")
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():  # what is too much, and what is missing
                raise SpectuneError(
                    f"{path}, row {number}: has other columns than the first line; quote "
                    f"{'commas' if delimiter == ',' else repr(delimiter)} in texts"
                )
            yield row, f"{path}, row {number}"
    except csv.Error as error:
        raise SpectuneError(f"cannot read {path}: it is not CSV ({error})") from None


def _table(path: Path, suffix: str) -> Iterator[dict[str, Any]]:
    datasets = need("datasets", f"reading {str(path)!r}")

    try:
        if suffix == ".arrow":
            return _named(datasets.Dataset.from_file(str(path)))
        return _named(datasets.load_dataset("parquet", data_files=str(path), split="train"))
    except Exception as error:  # whatever the readers raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise SpectuneError(f"cannot read the data {str(path)!r}: {reason[:200]}") from None


def _stored(path: Path) -> Rows:
    datasets = need("datasets", f"reading {str(path)!r}")

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise SpectuneError(f"cannot read the data {str(path)!r}: {' '.join(str(error).split())[:200]}") from None
    yield from _numbered(_named(table), str(path))


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
    yield from _numbered(_named(table), source)


def _named(table: datasets.Dataset) -> Iterator[dict[str, Any]]:
    import datasets

    names = {k: f for k, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for row in map(dict, table):  # what has no label has -1
        yield row | {k: f.int2str(row[k]) for k, f in names.items() if row[k] is not None and row[k] >= 0}

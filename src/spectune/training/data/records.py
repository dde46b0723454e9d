"""Records: read from files and data sets, checked, and split."""

from __future__ import annotations

import codecs
import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from spectune.errors import SpectuneError, nearest, need

Record = Mapping[str, Any]


class Row(dict[str, Any]):
    """A record that knows where it comes from.

    Args:
        where: file and line, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


@contextmanager
def of(record: Record) -> Iterator[None]:
    """Within the context, a `SpectuneError` says which record it is about."""
    try:
        yield
    except SpectuneError as error:
        where = getattr(record, "where", None)
        raise (SpectuneError(f"{where}: {error}") if where else error) from None


_FILES = (".jsonl", ".json", ".csv", ".parquet")


class Form(Protocol):
    """What reading asks of a task."""

    forms: ClassVar[str]  # the keys of a record, for messages

    @property
    def config(self) -> Any:
        """The run's configuration, of which `columns` is read: the task's names for those of the data."""
        ...

    def problem(self, record: Record) -> str | None:
        """Return what is wrong with the form of a record, or None."""
        ...


def read(source: str | Path, task: Form, config_name: str | None = None, split_name: str | None = None) -> list[Record]:
    """Read the records of a JSONL, CSV or Parquet file, or of a split of a data set.

    Args:
        source: the file; or the data set's folder or id.
        task: which says what each record must look like.
        config_name: of the data set, where it has several configurations.
        split_name: of the data set; train if not given.

    Raises:
        SpectuneError: what cannot be read, or a record of another form, with its number.
    """
    path = Path(source)
    if not path.is_dir() and (path.exists() or path.suffix in _FILES):
        if config_name is not None or split_name is not None:
            raise SpectuneError(f"{source} is a file; data_config, data_split and eval_split are for data sets")
        if path.suffix not in (".csv", ".parquet"):
            return read_jsonl(path, task)
        if path.suffix == ".csv":
            rows = _csv_rows(path)
        elif path.exists():
            rows = _table_rows("parquet", data_files=str(path), split="train")
        else:
            raise SpectuneError(f"cannot read {path}: no such file")
    else:
        rows = _table_rows(str(source), name=config_name, split=split_name or "train")
    records: list[Record] = [Row(_renamed(row, task), f"{source}, row {i}") for i, row in enumerate(rows, start=1)]
    for number, record in enumerate(records, start=1):
        problem = _problem(record, task)
        if problem is not None:
            raise SpectuneError(f"{source}, row {number}: {problem}")
    if not records:
        raise SpectuneError(f"{source} holds no examples; each row needs {task.forms}")
    return records


def _csv_rows(path: Path) -> list[Record]:
    """Read a CSV file, every field as the text that it is: neither 007 nor None means anything else."""
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[Any] = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise SpectuneError(f"cannot read {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise SpectuneError(f"cannot read {path}: it is not CSV in UTF-8 ({error})") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # what is too much, and what is missing
            raise SpectuneError(f"{path}, row {number}: has other columns than the first line; quote commas in texts")
    return rows


def _table_rows(source: str, **options: Any) -> list[Record]:
    """Return what datasets.load_dataset reads, with the names of labels for their numbers."""
    datasets = need("datasets", f"reading {options.get('data_files', source)!r}")
    try:
        table = datasets.load_dataset(source, **options)
    except Exception as error:  # whatever the many readers raise
        named, reason = options.get("data_files", source), " ".join(str(error.__cause__ or error).split())
        raise SpectuneError(f"cannot read the data {named!r}: {reason[:200]}") from None
    names = {k: f for k, f in table.features.items() if isinstance(f, datasets.ClassLabel)}  # type: ignore[union-attr]
    return [  # what has no label has -1
        row | {k: f.int2str(row[k]) for k, f in names.items() if row[k] is not None and row[k] >= 0}  # type: ignore
        for row in table
    ]


def read_jsonl(path: str | Path, task: Form) -> list[Record]:
    """Read the records of a JSONL file and check the form of each.

    Raises:
        SpectuneError: no such file, an empty one, or a broken line, with its number.
    """
    records: list[Record] = []
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise SpectuneError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SpectuneError(f"{path}, line {number}: not valid JSON ({error})") from None
        record = _renamed(record, task)
        problem = _problem(record, task)
        if problem is not None:
            raise SpectuneError(f"{path}, line {number}: {problem}")
        records.append(Row(record, f"{path}, line {number}"))
    if not records:
        raise SpectuneError(f"{path} holds no examples; each line is a JSON object with {task.forms}")
    return records


def _renamed(record: Any, task: Form) -> Any:
    """Return a record with the task's names for the columns that `columns` names."""
    columns = task.config.columns
    if not columns or not isinstance(record, dict):
        return record
    for theirs in columns.values():
        if theirs not in record:
            raise SpectuneError(f"columns: the data has no {theirs!r}{nearest(theirs, record)}")
    others = {k: v for k, v in record.items() if k not in columns and k not in columns.values()}
    return {**others, **{ours: record[theirs] for ours, theirs in columns.items()}}


def _problem(record: Any, task: Form) -> str | None:
    return task.problem(record) if isinstance(record, dict) else f"not a JSON object with {task.forms}"


def form(record: Record) -> str | None:
    """Return which of the forms of `Sft` a record has, by the key that tells: messages, completion, text, or None.

    A table has every column in every row, so that a key without a value is none.
    """
    there = {key for key, value in record.items() if value is not None}
    if "messages" in there:
        return "messages"
    return "completion" if {"prompt", "completion"} <= there else "text" if "text" in there else None


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return records for training and a held-out share of them, at random by the seed.

    Raises:
        SpectuneError: one of the two would be empty.
    """
    held = round(len(records) * share)
    if share > 0 and held in (0, len(records)):
        raise SpectuneError(
            f"held_out={share} of {len(records)} examples leaves one side empty; give more data, another share, or 0"
        )
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    return [records[i] for i in sorted(order[held:])], [records[i] for i in sorted(order[:held])]

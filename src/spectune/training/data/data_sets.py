"""Rows that know their kinds: of Parquet and Arrow files, and of data sets, as `datasets` reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.errors import SpectuneError, nearest, need
from spectune.reading import RECORDS
from spectune.training.data.json_rows import Rows, numbered

if TYPE_CHECKING:
    import datasets

_BATCH = 64  # rows of a table that are in memory, of which each may be large where few bytes stand for many


def table_rows(path: Path, suffix: str) -> Iterator[dict[str, object]]:
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


def stored_rows(path: Path) -> Rows:
    datasets = need("datasets", f"reading {str(path)!r}")

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise SpectuneError(f"cannot read the data {str(path)!r}: {' '.join(str(error).split())[:200]}") from None
    yield from numbered(_named(table), str(path))


def data_set_rows(source: str, config_name: str | None, split_name: str | None) -> Rows:
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

"""Rows that know their kinds: Parquet, Arrow, what `datasets` has stored."""

from decimal import Decimal

import pytest

from spectune import SpectuneError
from spectune.training.data import data_sets
from spectune.training.data.files import rows


def read(path, split=None):
    return [row for row, _ in rows(str(path), None, split, print)]


def test_numbers_and_texts_of_a_table_as_programs_write_them(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [b"h\xc3\xa4", None, b"\xff"], "label": [Decimal("1.50"), None, Decimal("2.00")]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"text": "hä", "label": 1.5},
        {"text": None, "label": None},
        {"text": b"\xff", "label": 2.0},
    ]


def test_rows_of_parquet_are_counted_before_they_are_read(monkeypatch, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 200}), path)
    assert read(path) == [{"text": "a"}] * 200
    monkeypatch.setattr(data_sets, "RECORDS", 199)
    with pytest.raises(SpectuneError, match=r"a.parquet has 200 rows, and at most 199 are read"):
        read(path)


def test_labels_of_a_list_have_their_names():
    datasets = pytest.importorskip("datasets")
    feature = datasets.Features({"labels": datasets.Sequence(datasets.ClassLabel(names=["joy", "fear"]))})
    table = datasets.Dataset.from_dict({"labels": [[1], [0, 1], []]}, features=feature)
    assert [row["labels"] for row in data_sets._named(table)] == [["fear"], ["joy", "fear"], []]


def test_what_datasets_has_stored(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    table.save_to_disk(tmp_path / "stored")
    assert [row["label"] for row in read(tmp_path / "stored")] == ["spam", "ham", -1]
    (tmp_path / "stored" / "state.json").write_text("{")
    with pytest.raises(SpectuneError, match=r"cannot read the data '.*stored'"):
        read(tmp_path / "stored")


def test_a_folder_of_files_has_splits_by_their_names(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n')
    assert read(tmp_path) == [{"text": "a"}]
    assert read(tmp_path, "test") == [{"text": "b"}]
    with pytest.raises(SpectuneError, match=r"cannot read the data '.*'.*dev"):
        read(tmp_path, "dev")

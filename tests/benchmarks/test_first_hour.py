"""The benchmark of ten data files: its files are what they are said to be, and a run says what came of it."""

import json
import sys
from pathlib import Path

import pytest

from spectune.training.data.files import rows
from training.folder import save_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def hour(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import first_hour

    yield first_hour
    sys.modules.pop("first_hour")


def test_it_makes_ten_files_alike_each_time(hour, tmp_path):
    assert len(hour.SHAPES) == 10
    for name in hour.SHAPES:
        path = hour.write(name, tmp_path)
        made = path.read_bytes()
        found = [record for record, _ in rows(str(path), None, None, pytest.fail)]
        assert len(found) >= 30, name
        assert hour.write(name, tmp_path).read_bytes() == made
    assert "elli sekiz" in (tmp_path / "multilingual.jsonl").read_text(encoding="utf-8")
    spam = [record for record, _ in rows(str(tmp_path / "skewed.csv"), None, None, print) if record["label"] == "spam"]
    assert len(spam) == 60


def test_a_run_has_what_was_held_out_before_and_after_or_why_not(hour, tmp_path, monkeypatch):
    tiny = hour.SHAPES["tiny"]._replace(model=str(save_folder(tmp_path / "model")))
    monkeypatch.setitem(hour.SHAPES, "tiny", tiny)
    found = hour.run("tiny", tmp_path, 2)
    assert found["before"].keys() == found["after"].keys() == {"loss"}
    assert "max_length" in found["chosen"]
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setitem(hour.SHAPES, "tiny", tiny._replace(model="smollm3"))
    assert "unknown model 'smollm3'" in hour.run("tiny", tmp_path, 2)["refused"]

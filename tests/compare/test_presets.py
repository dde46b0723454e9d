"""Comparisons without data of one's own: their records are there once, alike each time, with known labels."""

import json

import pytest

from spectune.bases import sources
from spectune.compare import presets
from spectune.compare.config import CompareConfig
from spectune.compare.presets import preset, question_types, rated_reviews, write_records
from spectune.errors import SpectuneError


def test_questions_are_there_once_with_the_first_part_of_their_label():
    found = question_types(300)
    assert len({record["text"] for record in found}) == len(found) == 300
    assert {record["label"] for record in found} <= {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}
    kinds: dict[str, set[str]] = {}
    for label, question in sources.questions():
        kinds.setdefault(question.strip(), set()).add(label.partition(":")[0])
    assert all(record["label"] in kinds[record["text"]] for record in found)
    assert question_types(20) == found[:20]  # the same order whatever the count


def test_reviews_are_of_both_kinds_and_none_is_lukewarm():
    ratings = sources.reviews()
    found = rated_reviews(10**9)
    assert len(found) == sum(abs(rating) >= 1 for rating in ratings.values())
    assert all((record["label"] == "positive") == (ratings[record["text"]] > 0) for record in found)
    assert {record["label"] for record in found} == {"positive", "negative"}
    assert rated_reviews(5) == found[:5]


def test_the_quick_one_writes_its_data_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = preset("quick")
    path = tmp_path / settings["data"]
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == question_types(700)
    CompareConfig(**settings)
    path.write_text("of somebody's own")
    again = preset("quick")
    assert again == settings
    assert path.read_text() == "of somebody's own"
    again["model"] = "another"
    assert preset("quick")["model"] == settings["model"]
    assert presets._QUICK.keys() | {"data"} == settings.keys()


def test_another_name():
    with pytest.raises(SpectuneError, match=r"preset: 'quik' is not known; did you mean 'quick'\? \(known: quick\)"):
        preset("quik")


def test_records_are_lines_of_json(tmp_path):
    records = [{"text": 'a "quoted"\nline', "label": "ü"}, {"text": "b", "label": 1}]
    write_records(tmp_path / "r.jsonl", records)
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records

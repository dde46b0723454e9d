"""The parts of a comparison's data: folds, the test, their labels, and what cannot be compared."""

import json
from collections import Counter

import pytest

from compare.tiny_bench import config
from spectune import SpectuneError
from spectune.compare.bench import Bench
from spectune.compare.parts import Parts


def test_folds_and_the_test_share_no_record_and_take_turns(folder, tmp_path):
    parts = Bench(config(folder, tmp_path, validation=0.2)).parts
    assert len(parts.folds) == 4
    texts = [record["text"] for part in (parts.test, *parts.folds) for record in part]
    assert len(texts) == len(set(texts))
    assert [len(part) for part in parts.records.values()] == [72, 18, 30]
    held = [{str(e["input_ids"]) for e in parts.fold(seed).validation} for seed in range(8)]
    assert held[:4] == held[4:]
    assert len(set.union(*held)) == sum(map(len, held[:4]))
    for seed, own in enumerate(held):
        learned = {str(e["input_ids"]) for e in parts.fold(seed).train}
        assert not learned & own
        assert len(learned) + len(own) == 90


def test_parts_have_their_share_of_every_label_and_no_copy_is_in_two(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rare = [row for row in rows if row["label"] == "few"][:30]
    often = [row for row in rows if row["label"] == "many"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*rare, *rare, *often, *often])))
    parts = Parts(config(folder, tmp_path, data=str(tmp_path / "data.jsonl"))).records
    counts = {name: Counter(record["label"] for record in part) for name, part in parts.items()}
    assert all(abs(count["few"] / count.total() - 1 / 3) < 0.07 for count in counts.values())
    texts = [{record["text"] for record in part} for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 90


def test_a_test_that_says_nothing_is_refused_before_anything_is_loaded(folder, tmp_path):
    values = {"model": "nowhere"}
    with pytest.raises(SpectuneError, match="test has 12 records, and says nothing below 20"):
        Bench(config(folder, tmp_path, **values, test=0.1))
    with pytest.raises(SpectuneError, match="validation has 3 records"):
        Bench(config(folder, tmp_path, **values, validation=0.03))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["label"] == "few"))
    with pytest.raises(SpectuneError, match="60 test records has the answer 'few', so that accuracy tells no method"):
        Bench(config(folder, tmp_path, **values, test_data=str(tmp_path / "test.jsonl")))


def test_a_difference_to_detect_takes_a_larger_test(folder, tmp_path):
    parts = Parts(config(folder, tmp_path, detect=12))
    assert len(parts.test) == 55
    assert any(note.startswith("test=0.46, for detect=12") for note in parts.notes)
    assert len(Parts(config(folder, tmp_path, detect=2)).test) == 60
    assert len(Parts(config(folder, tmp_path, detect=2, test=0.3)).test) == 36

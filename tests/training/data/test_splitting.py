"""What is held out, what is taken how often, and what is there twice."""

from collections import Counter

import pytest

from spectune.errors import SpectuneError
from spectune.training.data.rows import Row
from spectune.training.data.splitting import copies, repeated, split


def test_split_is_disjoint_complete_and_seeded():
    records = [{"text": str(i)} for i in range(50)]
    train, held = split(records, 0.2, seed=3)
    assert len(held) == 10
    assert sorted(r["text"] for r in train + held) == sorted(r["text"] for r in records)
    assert split(records, 0.2, seed=3) == (train, held)
    assert split(records, 0.2, seed=4) != (train, held)
    assert split(records, 0.0, seed=3) == (records, [])


def test_a_share_is_one_record_at_least():
    records = [{"text": str(i)} for i in range(10)]
    assert [len(part) for part in split(records, 0.05, seed=0)] == [9, 1]
    assert [len(part) for part in split(records[:2], 0.1, seed=0)] == [1, 1]
    with pytest.raises(SpectuneError, match=r"held_out=0.1 of 1 examples"):
        split(records[:1], 0.1, seed=0)
    assert [len(part) for part in split([{"text": "a"}] * 9, 0.3, seed=0)] == [6, 3]  # there is nothing else


def test_records_that_are_the_same_are_on_one_side():
    records = [{"text": str(i % 12), "id": i} for i in range(60)]
    for seed in range(5):
        train, held = split(records, 0.2, seed)
        assert {r["text"] for r in train}.isdisjoint(r["text"] for r in held)
        assert len(train) + len(held) == 60
        assert 5 <= len(held) <= 20


def test_a_share_has_as_much_of_every_label_and_learning_has_all():
    records = [{"text": str(i), "label": "abc"[0 if i < 30 else 1 if i < 39 else 2]} for i in range(40)]
    for seed in range(5):
        train, held = split(records, 0.3, seed, lambda record: record["label"])
        counts = Counter(record["label"] for record in held)
        assert {record["label"] for record in train} == set("abc")
        assert (counts["a"], counts["b"], counts["c"]) in ((9, 3, 0), (10, 2, 0))
    with pytest.raises(SpectuneError, match="each label is there once"):
        split(records[28:29] + records[38:], 0.3, 0, lambda record: record["label"] + record["text"])


def weighted(name, weight):
    row = Row({"text": name}, name)
    row.weight = weight
    return row


def test_weights_are_taken_whole_and_what_is_left_of_them_by_chance():
    records = [weighted("twice", 2.0), weighted("never", 0.0), *(weighted("half", 0.5) for _ in range(200))]
    found = Counter(record["text"] for record in repeated(records, 0))
    assert found["twice"] == 2
    assert "never" not in found
    assert 70 < found["half"] < 130
    assert repeated(records, 0) == repeated(records, 0) != repeated(records, 1)
    assert repeated([{"text": "plain"}], 0) == [{"text": "plain"}]


def test_copies_are_counted_within_and_between():
    ours = [{"text": "a"}, {"text": "a"}, {"text": "b"}]
    assert copies(ours, [{"text": "b"}, {"text": "b"}, {"text": "c"}]) == (1, 2)
    assert copies([], []) == (0, 0)
    assert copies(ours, [{"text": "a", "id": 3}])[1] == 1  # what no task reads makes no difference

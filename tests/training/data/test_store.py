"""What is encoded is found again, as it was made, by the same records and the same tokenizer alone."""

import pytest

from spectune.training.data import store
from spectune.training.data.encoding import Encoder, Example
from spectune.training.data.records import Row
from training.data.families import TEMPLATES, make

TALK = [
    {"role": "user", "content": "what is one"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "and two"},
    {"role": "assistant", "content": " No"},
]
RECORDS = [
    {"messages": TALK},
    {"prompt": "Answer: ", "completion": "Yes"},
    {"text": "what is one"},
    {"prompt": TALK[:1], "completion": TALK[1:2]},
    {"messages": TALK[:2]},
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "_WORTH", 1)
    return tmp_path / "examples"


def made(tokenizer, records=RECORDS, what="test"):
    encoder = Encoder(tokenizer)
    return store.stored(encoder, records, what, encoder.asking)


@pytest.mark.parametrize("template", TEMPLATES)
def test_examples_are_those_of_each_record_alone(template):
    tokenizer = make(template)
    encoder = Encoder(tokenizer)
    expected = [encoder.examples(record) for record in RECORDS]
    first, again = made(tokenizer), made(tokenizer)
    assert [*first] == [*again] == expected
    assert first.notes == again.notes == encoder.notes()


def test_the_second_time_nothing_is_tokenized(monkeypatch):
    tokenizer = make("chatml")
    first = made(tokenizer)
    monkeypatch.setattr(Encoder, "of_all", lambda *args: pytest.fail("tokenized again"))
    assert [*made(tokenizer)] == [*first]


def test_other_records_templates_tasks_and_damage_are_made_anew(folder):
    tokenizer = make("chatml")
    made(tokenizer)
    made(tokenizer, RECORDS[1:])
    made(tokenizer, [Row(record, "", {"prompt": "a", "completion": "b"}) for record in RECORDS])
    made(tokenizer, what="other")
    tokenizer.chat_template = make("llama3").chat_template
    made(tokenizer)
    assert len([*folder.iterdir()]) == 5
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    assert store.Store.load(newest) is None
    expected = [Encoder(tokenizer).examples(record) for record in RECORDS]
    assert [*made(tokenizer)] == expected
    assert store.Store.load(newest) is not None


def test_the_entries_used_last_are_kept(folder, monkeypatch):
    monkeypatch.setattr(store, "_KEPT", 2)
    for number in range(4):
        made(make("chatml"), what=str(number))
    assert len([*folder.iterdir()]) == 2


def test_a_limit_cuts_and_leaves_out():
    examples = [[Example([1, 2, 3, 4], [False, False, True, True])], [Example([5, 6], [True, False])], []]
    examples += [[Example([7, 8], [False, True]), Example([9], [True])]]
    held = store.Store.of(examples, list)
    assert [*held] == examples
    kept, cut, dropped = held.learned(3)
    assert kept == [Example([1, 2, 3], [False, False, True]), Example([7, 8], [False, True])]
    assert (cut, dropped) == (1, 2)
    assert held.learned(2)[0][:] == [Example([7, 8], [False, True])]
    assert [*store.Store.of([], list)] == []

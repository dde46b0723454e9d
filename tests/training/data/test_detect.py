"""What data is for."""

import json

import pytest

from spectune.errors import SpectuneError
from spectune.training.data.detect import detect

CHAT = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "ahoy"}]
SHAPES = {
    "chats": ({"messages": CHAT}, "sft", {}),
    "alpaca": ({"instruction": "say", "input": "", "output": "ahoy"}, "sft", {}),
    "text": ({"text": "one two"}, "sft", {}),
    "other": ({"id": 1, "question_en": "what is it", "reply_en": "it is a longer text"}, "sft", "question_en"),
    "pairs": ({"prompt": "say", "chosen": "ahoy", "rejected": "no"}, "dpo", {}),
    "only": ({"lyrics": "la la la"}, "sft", {"text": "lyrics"}),
}


def write(tmp_path, rows):
    place = tmp_path / "data.jsonl"
    place.write_text("\n".join(map(json.dumps, rows)))
    return str(place)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_task_and_its_columns(shape, tmp_path):
    record, task, columns = SHAPES[shape]
    found = detect(write(tmp_path, [record] * 8), generates=True)
    assert found.task == task
    assert found.columns == columns or columns in found.columns.values()


@pytest.mark.parametrize("generates", [False, True])
def test_texts_with_labels(generates, tmp_path):
    rows = [{"id": i, "sentence": f"text number {i}", "kind": i % 3, "date": f"2020-01-{i}"} for i in range(30)]
    found = detect(write(tmp_path, rows), generates=generates)
    assert (found.task, found.columns) == ("classify", {"text": "sentence", "label": "kind"})
    rows = [{"premise": f"a {i}", "hypothesis": f"b {i}", "label": i % 2} for i in range(9)]
    assert detect(write(tmp_path, rows), generates=generates).columns == {
        "text": "premise",
        "text_pair": "hypothesis",
    }


def test_an_encoder_needs_labels(tmp_path):
    with pytest.raises(SpectuneError, match="no column that looks like a label"):
        detect(write(tmp_path, [{"text": f"text {i}"} for i in range(9)]), generates=False)


def test_headings_in_other_cases_are_those_of_the_format(tmp_path):
    rows = [{"Instruction": f"say {i}", "Input ": "a long text to work on", "Output": "ahoy"} for i in range(8)]
    found = detect(write(tmp_path, rows), generates=True)
    assert (found.task, found.columns) == ("sft", {"instruction": "Instruction", "output": "Output", "input": "Input "})
    rows = [{"Prompt": "say", "Chosen": "ahoy", "Rejected": f"no {i}", "Id": i} for i in range(8)]
    found = detect(write(tmp_path, rows), generates=True)
    assert (found.task, found.columns) == ("dpo", {"chosen": "Chosen", "rejected": "Rejected", "prompt": "Prompt"})
    rows = [{"Question": f"who {i}", "Label": i % 2} for i in range(8)]
    assert detect(write(tmp_path, rows), generates=True).columns == {"text": "Question", "label": "Label"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 8, "has one label only in 'label', 'a', so that there is nothing to tell apart"),
        ([*"abcdefgh"], "has 8 different values in 'label' in 8 records, such as 'a': no labels"),
        ([["a"], "a"] * 4, r"has labels of several kinds in 'label' \(list, str\)"),
    ],
)
def test_why_labels_are_none(labels, message, tmp_path):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    with pytest.raises(SpectuneError, match=message):
        detect(write(tmp_path, rows), generates=False)
    with pytest.raises(SpectuneError, match=r"has labels in 'label', and no text beside them \(label, id\)"):
        detect(write(tmp_path, [{"label": i % 2, "id": i} for i in range(8)]), generates=False)


def test_a_record_that_is_none_is_named(tmp_path):
    with pytest.raises(SpectuneError, match=r"data.jsonl, line 2: a record is an object with names .* and not 'two'"):
        detect(write(tmp_path, [{"text": "a"}, "two"]), generates=True)
    rows = [{"question": "1 + 1", "answer": "2"}, {"question": "1 + 2", "answer": 3}]
    with pytest.raises(SpectuneError, match=r"data.jsonl, line 2: 'answer' must be a text"):
        detect(write(tmp_path, rows), generates=True)

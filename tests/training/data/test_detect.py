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

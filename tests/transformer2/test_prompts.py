"""Prompts from the data of every task."""

import json

import pytest

from spectune.errors import SpectuneError
from spectune.transformer2.prompts import read_prompts

TURNS = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}]


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_the_prompts_of_every_tasks_data(tmp_path):
    records = [
        {"messages": TURNS},
        {"prompt": "say two", "completion": "two"},
        {"messages": None, "prompt": "say three", "answer": 3},
        {"prompt": [{"role": "system", "content": "be kind"}, *TURNS[:1]], "answer": "one"},
        {"prompt": "say four", "chosen": "four", "rejected": "five"},
        {"text": "say five", "label": 1},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "six"}]}
            ]
        },
    ]
    read = read_prompts(write(tmp_path / "data.jsonl", *records))
    assert read == ["say one", "say two", "say three", "say one", "say four", "say five", "say six"]
    (tmp_path / "data.csv").write_text("prompt,answer\n1+1=,2\n")
    assert read_prompts(tmp_path / "data.csv") == ["1+1="]
    (tmp_path / "data.txt").write_text("\ufeffsay\u2028one\x0c\r\n\nsay two\n")
    assert read_prompts(tmp_path / "data.txt") == ["say\u2028one", "say two"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "one"}, "line 1: has the keys 'question'; it needs 'messages', 'prompt' or 'text'"),
        ({"prompt": 5}, "line 1: a prompt must be text, or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "line 1: a prompt must be text, or a list of messages"),
        ({"messages": []}, "line 1 and all others have a text without content"),
    ],
)
def test_records_that_ask_nothing(tmp_path, record, message):
    with pytest.raises(SpectuneError, match=message):
        read_prompts(write(tmp_path / "data.jsonl", record))

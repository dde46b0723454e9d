"""Lists of records as a stream, and bounds on what a file of data may hold."""

import io
import json
import random
from pathlib import Path

import pytest

from spectune import SpectuneError
from spectune.training.data import files, json_rows, records
from spectune.training.data.files import rows
from training.data.test_data_files import found

PLACE = Path("data.json")


def read(text, chunk=7, monkeypatch=None):
    stream = io.StringIO(text)
    return [item for item, _ in json_rows.list_of(PLACE, lambda size: stream.read(min(size, chunk)))]


def value(draw, depth=0):
    kind = draw.randrange(5 if depth < 3 else 3)
    if kind == 0:
        return draw.choice([1, -2.5, 1e30, True, None, 123456])
    if kind < 3:
        return "".join(draw.choice('a ]}[{",\\\n\té☃🏴') for _ in range(draw.randrange(12)))
    if kind == 3:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {f"k{i}": value(draw, depth + 1) for i in range(draw.randrange(4))}


@pytest.mark.parametrize("seed", range(40))
def test_a_list_that_comes_in_pieces_is_what_json_says(seed):
    draw = random.Random(seed)
    items = [value(draw) for _ in range(draw.randrange(6))]
    text = json.dumps(items, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
    for chunk in (1, 2, 5, 1000):
        assert read(f" {text}\n \n"[draw.randrange(2) :], max(chunk, 2)) == items


def test_no_more_of_a_list_is_read_than_was_asked_for(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "a" * 1000}] * 2000))  # 2 MB
    with path.open() as file:
        first = next(json_rows.list_of(path, file.read))
        assert first == ({"text": "a" * 1000}, f"{path}, row 1")
        assert file.buffer.tell() < 1 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1} {"a": 2}]', "row 1, which begins in line 1, is not valid JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n\n{"a": }]', "row 2, which begins in line 3, is not valid JSON: Expecting value"),
        ('[{"a": 1},]', "row 2, which begins in line 1, is not valid JSON: Expecting value"),
        ('[{"a": 1}', "row 1, which begins in line 1, is not valid JSON"),
        ("[", "row 1, which begins in line 1, is not valid JSON"),
        ('[{"a": 1}]\n{"a": 2}', "data.json is not valid JSON: there is more behind the list"),
        ('[{"a": 1, "a": 2}]', "row 1 has the key 'a' twice"),
        ("[" * 200000, "row 1, which begins in line 1, is not valid JSON"),
        ("[" + "[" * 100 + "]" * 100 + "]", "row 1 is too deep"),
        (r'[{"a": "\ud800"}]', "row 1 has '\\\\ud800', half a character"),
    ],
)
def test_a_list_that_is_broken_says_where(text, message):
    with pytest.raises(SpectuneError, match=message):
        read(text, 100)


def test_an_item_has_a_bound(monkeypatch):
    monkeypatch.setattr(json_rows, "RECORD_BYTES", 1000)
    assert read(json.dumps(["a" * 900] * 20), 300) == ["a" * 900] * 20
    with pytest.raises(SpectuneError, match="row 2, which begins in line 1, is not valid JSON: it has more than 1,000"):
        read(json.dumps(["a", "a" * 5000]), 300)


def test_empty_lines_and_documents_have_a_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(json_rows, "_EMPTY_LINES", 10)
    assert len(found(tmp_path / "a.jsonl", ("\n" * 9 + '{"text": "a"}\n') * 3)[0]) == 3
    with pytest.raises(SpectuneError, match="line 12: it and 10 lines before it are empty"):
        found(tmp_path / "a.jsonl", '{"text": "a"}\n' + "\n" * 20)
    for module in (json_rows, files):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 100)
    with pytest.raises(SpectuneError, match="more than 100 bytes"):
        found(tmp_path / "a.json", json.dumps({"data": [{"text": "a" * 50}] * 3}, indent=1))


def test_records_have_a_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "RECORDS", 3)
    assert len(found(tmp_path / "a.jsonl", '{"text": "a"}\n' * 3)[0]) == 3
    with pytest.raises(SpectuneError, match="line 4: at most 3 records are read"):
        found(tmp_path / "a.jsonl", '{"text": "a"}\n' * 4)
    with pytest.raises(SpectuneError, match="at most 3 records are read"):
        found(tmp_path / "a.csv", "text\n" + '""\n' * 9)


@pytest.mark.parametrize("depth", [100, 5000, 100000])
def test_json_in_a_column_has_a_depth(depth, tmp_path):
    deep = "[" * depth + "{}" + "]" * depth
    for key in ("messages", "tools"):
        row = {"prompt": "a", "completion": "b", key: deep}
        with pytest.raises(SpectuneError, match=rf"line 1: '{key}' is (too deep|not valid JSON)"):
            found(tmp_path / "a.jsonl", json.dumps(row))
    row = {"prompt": deep, "completion": "b"}  # a text like another
    assert found(tmp_path / "a.jsonl", json.dumps(row))[0][0]["prompt"] == deep
    call = {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": deep}]}
    assert found(tmp_path / "a.jsonl", json.dumps(call))[0][0]["messages"][1]["content"] == deep


@pytest.mark.parametrize("text", ["[[1, 2], [3, 4]]", '[{"id": 1}]', "[ ] to do", "[]", '[{"role": "x"} and'])
def test_a_prompt_that_looks_like_json_is_text(text, tmp_path):
    rows = {"prompt": text, "chosen": text + "a", "rejected": text + "b"}
    records, _ = found(tmp_path / "a.jsonl", json.dumps(rows), "dpo")
    assert records[0]["prompt"] == text
    rows = {"prompt": "a", "chosen": text, "rejected": "b"}
    assert found(tmp_path / "a.jsonl", json.dumps(rows), "dpo")[0][0]["chosen"] == text


def test_a_line_behind_empty_ones_is_named_by_its_number(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n\n{"text": \n')
    read_so_far = rows(str(path), None, None, print)
    assert [next(read_so_far)[1] for _ in range(2)] == [f"{path}, line 1", f"{path}, line 4"]
    with pytest.raises(SpectuneError, match="line 6"):
        next(read_so_far)

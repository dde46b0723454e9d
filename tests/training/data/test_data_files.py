"""Files as people have them: read as they are meant, or refused in a sentence that says where and what to do."""

import csv
import gzip
import io
import json

import pytest

from spectune import SpectuneError
from spectune.training.config import load_config
from spectune.training.data.detect import detect
from spectune.training.data.records import read
from spectune.training.tasks import make_task

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


def found(path, content, task="sft", **columns):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    notes = []
    config = load_config(
        None, ["model=m", f"data={path}", "output=o", f"task={task}", f"columns={json.dumps(columns)}"]
    )
    return read(str(path), make_task(config), say=notes.append), " ".join(notes)


TWO = [("hello", "a"), ("ho", "b")]
TABLES = {
    "utf-16 without a mark.csv": "text,label\nhello,a\nho,b\n".encode("utf-16-le"),
    "utf-32.csv": "text,label\nhello,a\nho,b\n".encode("utf-32"),
    "old mac.csv": "text,label\rhello,a\rho,b\r",
    "excel.csv": "sep=;\r\ntext;label\r\nhello;a\r\nho;b\r\n",
    "spaces.csv": " text , label \nhello,a\nho,b\n",
    "index.csv": ",,text,label\n0,0,hello,a\n1,1,ho,b\n",
    "last comma.csv": "text,label,\nhello,a,\nho,b,\n",
    "empty rows.csv": "text,label\n\nhello,a\n,\nho,b\n,\n",
    "more commas.csv": "text,label\nhello,a,,\n,,\nho,b,\n",
    "not packed.csv.gz": "text,label\nhello,a\nho,b\n",
    "put together.jsonl": "".join(f"\ufeff{json.dumps({'text': t, 'label': c})}\n" for t, c in TWO),
    "quoted.csv": '"text","label"\n"hello","a"\n"ho","b"\n',
    "packed under another name.jsonl": gzip.compress(lines(*({"text": t, "label": c} for t, c in TWO)).encode()),
    "array.jsonl": json.dumps([{"text": t, "label": c} for t, c in TWO]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind(name, tmp_path):
    records, _ = found(tmp_path / name, TABLES[name], "classify")
    assert [(record["text"], record["label"]) for record in records] == TWO
    assert detect(str(tmp_path / name), generates=False).columns == {}


FORMATS = [
    (
        {"contents": [{"role": "user", "parts": [{"text": "hi"}]}, {"role": "model", "parts": [{"text": "ho"}]}]},
        "parts",
    ),
    ({"messages": [{"role": "User", "content": "hi"}, {"role": "Chatbot", "content": "ho"}]}, "messages"),
    ({"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:], "non_preferred_output": TALK}, "preferences"),
    ({"conversation": TALK, "model": "vicuna", "turn": 1}, "conversations"),
]


@pytest.mark.parametrize(("record", "name"), FORMATS)
def test_conversations_under_other_names(record, name, tmp_path):
    records, notes = found(tmp_path / "a.jsonl", lines(record))
    assert name in notes
    said = records[0].get("messages") or [*records[0]["prompt"], *records[0]["completion"]]
    roles = [(m["role"], m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]) for m in said]
    assert roles == [("user", "hi"), ("assistant", "ho")]


def test_openais_preferences_are_pairs(tmp_path):
    record = {"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:], "non_preferred_output": TALK[1:]}
    records, _ = found(tmp_path / "a.jsonl", lines(record), "dpo")
    assert records[0]["prompt"] == TALK[:1]
    assert records[0]["chosen"] == TALK[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "hello there\n", 'plain text and holds no records: write each as a line of JSON, as {"text": "..."}'),
        ("a.xlsx", b"PK\x03\x04", "an Excel workbook: unpack it, or save it as CSV"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.json", "<!DOCTYPE html>", "is a web page and not data"),
        ("a.jsonl", '{"text": "ok"}\n{"text": "\\ud83d cut"}', "line 2 has '\\ud83d', half a character"),
        ("a.jsonl", '{"text": "hi", "role": "user"}', "line 1: has 'role', which would change what is learned"),
        (
            "a.jsonl",
            lines({"messages": TALK[:1]}),
            "line 1: messages has no assistant turn to learn from (roles: user)",
        ),
        ("a.jsonl", '{"text": "a"}\n[1]', "line 2: not a JSON object"),
        (
            "a.csv",
            "text\nhello, there\n",
            "row 1: has other columns than the first line (2 for 1 names); quote commas in texts",
        ),
        (
            "a.csv",
            "text,label\nhello\n",
            "row 1: has other columns than the first line (1 for 2 names); quote texts with",
        ),
        (
            "a.csv",
            'text,b\na,b\n"c\nd",e\n"f" g,h\n',
            "row 3, which begins in line 5: it is not CSV (',' expected after",
        ),
        ("a.csv", "text,label\nhello,a\ntext,label\n", "row 2: has the names of the first line again: take it out"),
        ("a.tsv", 'text\tlabel\n"Good\ta\nBad"\tb\n', "row 1: 'text' goes on over the ends of rows, from one quote to"),
        (
            "a.tar.gz",
            gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar" + b"\0" * 300),
            "is a tar archive: unpack it",
        ),
        ("a.pkl", b"\x80\x04\x95abc", "is binary, and of no known kind"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a"},\n',
            "line 2 is not valid JSON: a comma follows the record; take the",
        ),
        (
            "a.jsonl",
            '{"text": "a"}{"text": "b"}',
            "line 1 is not valid JSON: more follows the record at character 14; write",
        ),
        ("a.jsonl", '{\n"text": "a"\n}', "at character 2; write each record on one line, as `jq -c . FILE` does"),
        (
            "a.jsonl",
            "{'text': 'a'}",
            "at character 2; names and texts stand in double quotes: write records by json.dumps",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b',
            "line 2 is not valid JSON: Unterminated string at character",
        ),
        (
            "a.json",
            '{\n"text": "a"\n}\n{\n"text": "b"\n}',
            "Extra data: line 4 column 1 (char 16); write one record a line",
        ),
        ("a.json", '[{"text": "a"},]', "Expecting value; JSON has no comments, and no comma before a bracket"),
        ("a.json", '{"prompt": ["a", "b"], "completion": ["c", "d"]}', "holds a list for each column and not records"),
        (
            "a.json",
            '{"prompt": {"0": "a"}, "completion": {"0": "c"}}',
            "holds objects inside one object and not records",
        ),
        ("a.json", '{"a": {"text": "b"}, "c": {"text": "d"}}', "orient='records', lines=True) does"),
        ("a.jsonl", '{"prompt": "a", "completion": 5}', "lists of messages; completion is 5: write it in quotes"),
        ("a.jsonl", '{"prompt": "a", "completion": ["b"]}', "prompt is text, completion is a list"),
        ("a.csv", "text,text\na,b\n", "two columns are named 'text'"),
    ],
)
def test_what_cannot_be_read_says_where_and_what_to_do(name, content, message, tmp_path):
    with pytest.raises(SpectuneError) as error:
        found(tmp_path / name, content)
    assert message in str(error.value)


def test_what_a_user_should_know_is_said(tmp_path):
    _, notes = found(tmp_path / "a.json", json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}))
    assert "was read from 'train' alone; it has 'test' too" in notes
    _, notes = found(
        tmp_path / "b.jsonl", lines({"messages": []}, {"messages": TALK}, {"prompt": "a", "completion": ""})
    )
    assert "1 records have a text without content and were left out" in notes
    assert "1 records have an empty answer, of which a stop is learned, the first in" in notes
    _, notes = found(tmp_path / "c.jsonl", lines({"text": "a", "label": "x", "answer": "reject"}), "classify")
    assert "has fields that are not used: answer" in notes
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), ("häl", "a")])
    _, notes = found(tmp_path / "d.csv", out.getvalue().encode("utf-16-be"), "classify")
    assert "was read as utf-16-be" in notes
    _, notes = found(
        tmp_path / "e.csv", "It was good,pos\nBad,neg\nWell,pos\n", "classify", text="It was good", label="pos"
    )
    assert "e.csv, row 2 has 'pos' in the column of that name: the first line was taken for names" in notes
    _, notes = found(tmp_path / "f.csv", ",text,,\n0,a,,good\n1,b,,bad\n", "sft")
    assert "f.csv is not read, for it has no name in the first line; in" in notes
    _, notes = found(tmp_path / "g.jsonl", lines({"prompt": "a", "completion": " \n"}))
    assert "1 records have an empty answer" in notes
    _, notes = found(tmp_path / "h.jsonl", lines(*({"prompt": "a", "chosen": "b", "rejected": r} for r in "bc")), "dpo")
    assert "1 records have one answer as 'chosen' and as 'rejected'" in notes


def test_answers_of_a_table_that_are_called_bad_are_not_learned(tmp_path):
    table = "prompt,completion,label\na,b,True\nc,d,False\n,,\n"
    records, notes = found(tmp_path / "a.csv", table)
    assert [record["completion"] for record in records] == ["b"]
    assert "left out, for their label is false (1)" in notes
    assert detect(str(tmp_path / "a.csv"), generates=True).task == "kto"
    assert [record["label"] for record in found(tmp_path / "a.csv", table, "kto")[0]] == [True, False]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"title": "t", "paragraphs": [{"context": "c"}]}, "paragraphs"),
        ({"method": "POST", "url": "/v1", "body": {"messages": TALK}}, "body"),
    ],
)
def test_a_format_that_is_not_known_is_not_guessed_at(record, name, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(record))
    with pytest.raises(SpectuneError, match=f"has '{name}', which holds objects and is of no known format"):
        detect(str(tmp_path / "a.jsonl"), generates=True)


@pytest.mark.parametrize(
    ("rows", "task", "columns"),
    [
        ([{"text": f"t{i}", "labels": ["a"][: i % 2]} for i in range(9)], "classify", {"label": "labels"}),
        ([{"text": f"t{i}", "score": i / 7} for i in range(9)], "classify", {"label": "score"}),
        ([{"prompt": f"t{i}", "completion": "a", "label": i % 2 == 0} for i in range(9)], "kto", {}),
        ([{"text": "a", "__index_level_0__": 0}, {"text": "b", "__index_level_0__": 1}], "sft", {}),
    ],
)
def test_what_data_is_for(rows, task, columns, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    assert detect(str(tmp_path / "a.jsonl"), generates=True)[:2] == (task, columns)

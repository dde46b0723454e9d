"""Data in the shapes in which it is found."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest

from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig, load_config
from spectune.training.data import Encoder
from spectune.training.data.messages import is_learned
from spectune.training.data.records import read
from spectune.training.run import train
from spectune.training.tasks import make_task
from training.data.families import make
from training.folder import save_folder


def task_of(task="sft"):
    return make_task(TrainConfig(model="m", data="d", output="o", task=task))


def lines(path: Path, *rows) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def both(source, task="sft"):
    """Return the records of a source, and what was said of them."""
    said: list[str] = []
    return read(source, task_of(task), say=said.append), " ".join(said)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


ASKED = [user("what is one"), assistant("two")]
SHARED = [{"from": "human", "value": "what is one"}, {"from": "gpt", "value": "two"}]
SIX = [ASKED[0], {"role": "assistant", "content": "six"}]
CALL = {"name": "weather", "arguments": {"town": "Wien"}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]

WILD = [
    # format, the row, and the record that is learned
    ("Alpaca", {"instruction": "what is one", "input": "", "output": "two"}, ASKED),
    ("Alpaca", {"instruction": "what is", "input": "one", "output": "two", "text": "Below is"},
     [user("what is\none"), assistant("two")]),
    ("Alpaca", {"instruction": "what is one", "output": "two", "system": "say", "history": [["hello", "ahoy"]]},
     [{"role": "system", "content": "say"}, user("hello"), assistant("ahoy"), *ASKED]),
    ("instruction and response", {"instruction": "what is", "context": "one", "response": "two", "category": "qa"},
     [user("what is\none"), assistant("two")]),
    ("question and answer", {"question": "what is one", "answer": "two"}, ASKED),
    ("question and response", {"id": 1, "system_prompt": "say", "question": "what is one", "response": "two"},
     [{"role": "system", "content": "say"}, *ASKED]),
    ("ShareGPT", {"conversations": SHARED}, ASKED),
    ("ShareGPT", {"conversations": SHARED,
                  "system": "say", "id": "x"}, [{"role": "system", "content": "say"}, *ASKED]),
    ("ShareGPT", {"conversations": json.dumps(SHARED)},
     ASKED),
    ("messages", {"messages": ASKED, "source": "here"}, ASKED),
    ("messages", {"messages": json.dumps(ASKED)}, ASKED),
    ("messages", {"messages": [{**ASKED[0], "name": None}, {**ASKED[1], "tool_calls": None}]}, ASKED),
    ("prompt and completion", {"prompt": ASKED[:1], "completion": "two"}, ASKED),
    ("preferences, of which 'chosen' is learned", {"prompt": "what is one", "chosen": ASKED, "rejected": SIX}, ASKED),
    ("unpaired preferences", {"prompt": ASKED[:1], "completion": ASKED[1:], "label": True}, ASKED),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "messages"), WILD)
def test_a_format_is_recognised_and_named(tmp_path, name, row, messages):
    records, said = both(lines(tmp_path / "data.jsonl", row))
    assert f"was read as {name}" in said
    tokenizer = make("chatml")
    assert Encoder(tokenizer).one(records[0]) == Encoder(tokenizer).one({"messages": messages}) or (
        Encoder(tokenizer).one(records[0])
        == Encoder(tokenizer).one({"prompt": messages[:-1], "completion": messages[-1:]})
    )


def test_calls_of_sharegpt_are_the_assistants(tmp_path):
    talk = [("human", "what"), ("function_call", json.dumps(CALL)), ("observation", "two"), ("gpt", "one")]
    row = {"conversations": [{"from": role, "value": value} for role, value in talk], "tools": json.dumps(TOOLS)}
    (record,), _ = both(lines(tmp_path / "data.jsonl", row))
    assert record["tools"] == TOOLS
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert record["messages"][1]["tool_calls"][0]["function"] == CALL


def test_without_a_chat_template_instructions_are_written_as_published(tmp_path):
    row = {"instruction": "what is", "input": "one", "output": "two"}
    (record,), _ = both(lines(tmp_path / "data.jsonl", row))
    tokenizer = make(None)
    example = Encoder(tokenizer).one(record)
    text = tokenizer.decode(example.tokens)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nwhat is\n\n### Input:\none\n\n### Response:\ntwo</s>")
    assert tokenizer.decode([t for t, s in zip(*example, strict=True) if s]) == "two</s>"


PREFERENCES = [
    {"prompt": "what is one", "chosen": "two", "rejected": "six"},
    {
        "prompt": "what is one",
        "chosen": ASKED,
        "rejected": SIX,
        "score_chosen": 9.0,
    },
    {"prompt": ASKED[:1], "chosen": ASKED, "rejected": SIX},
    {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [assistant("six")]},
    {"chosen": ASKED, "rejected": SIX},
    {"system": "", "question": "what is one", "chosen": "two", "rejected": "six"},
    {
        "chosen": "\n\nHuman: what is one\n\nAssistant: two",
        "rejected": "\n\nHuman: what is one\n\nAssistant: six",
    },
    {
        "instruction": "what is one",
        "completions": [{"response": "six", "overall_score": 2.0}, {"response": "two", "overall_score": 7.5}],
    },
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_preferences_as_published(tmp_path, row):
    task = task_of("dpo")
    said: list[str] = []
    (record,) = read(lines(tmp_path / "data.jsonl", row), task, say=said.append)
    assert "preferences" in " ".join(said) or "scored completions" in " ".join(said)

    class Model:
        generation_config = None

    tokenizer = make("chatml")
    (pair,) = task.encode([record], Model(), tokenizer, 100).examples
    for example, answer in zip(pair, ("two", "six"), strict=True):
        text = tokenizer.decode(example.tokens)
        assert text.count("what is one") == 1
        learned = tokenizer.decode([t for t, s in zip(*example, strict=True) if s])
        assert learned.strip().removesuffix("<|im_end|>").removesuffix("</s>") == answer


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "one", "completion": "two", "system": "say"}, "line 1: has 'system', which would change"),
        ({"prompt": "one", "completion": "two", "tools": TOOLS}, "has 'tools'"),
        ({"messages": ASKED, "images": ["a.png"]}, "line 1: has 'images', which would change what is learned"),
        ({"messages": ASKED, "weight": 0.5}, "has 'weight'"),
        ({"messages": [ASKED[0], assistant("two", weight=0.5)]}, "weight must be 0 or 1, not 0.5 .message 2"),
        ({"messages": [ASKED[0], assistant("two", weight=0)]}, "each has weight 0"),
        ({"messages": [ASKED[0], assistant("two", loss=False)]}, "each has weight 0"),
        ({"messages": [ASKED[0], assistant("two", training=0)]}, "each has weight 0"),
        ({"messages": [ASKED[0], assistant("two", mask=True)]}, "has 'mask', which would change what is learned"),
        ({"messages": [{**ASKED[0], "train": True}, assistant("two")]}, "a message of the user has train=True"),
        ({"messages": [ASKED[0], assistant("", tool_calls="f()")]}, "line 1: 'tool_calls' is not valid JSON"),
        ({"messages": [ASKED[0], assistant("", tool_calls=["f"])]}, "tool_calls must be a list of calls"),
        ({"messages": [{"role": "system", "content": "a"}, *ASKED], "system": "b"}, "and another one in 'system'"),
        ({"messages": ASKED, "documents": [{"text": "a"}]}, "has 'documents', which would change"),
        ({"messages": ASKED, "enable_thinking": False}, "or put it into chat_template_kwargs"),
        ({"messages": ASKED, "chat_template_kwargs": "thinking"}, "'chat_template_kwargs' is not valid JSON"),
        ({"messages": ASKED, "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        ({"instruction": "one", "output": "two", "history": "three"}, "'history' must be a list of pairs of texts"),
        ({"instruction": "one", "output": "two", "history": ["a", "b"]}, "'history' must be a list of pairs of texts"),
        ({"instruction": "one", "output": ["two"]}, "'output' must be a text, as 'instruction' is"),
        ({"question": "one", "answer": 2}, "'answer' must be a text, as 'question' is, and is 2"),
        ({"question": "one", "options": ["a"], "answer": "A"}, "has 'options', which would change"),
        ({"prompt": "one", "completion": "two", "suffix": "three"}, "has 'suffix', which would change"),
        ({"messages": [ASKED[0], assistant([{"type": "image"}])]}, "a part of the type 'image'"),
        ({"messages": [ASKED[0], assistant(None)]}, "needs a role and a content"),
        ('{"text": "one", "text": "two"}', "line 1 has the key 'text' twice"),
        ({"question": "one"}, "line 1: has the keys 'question'; it needs"),
        ({"text": " "}, "holds no examples, for .*line 1 and all others have a text without content"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, row, message):
    path = tmp_path / "data.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(SpectuneError, match=message):
        both(path)


def test_what_a_form_does_not_learn_from_is_named(tmp_path):
    beside = {"prompt": "other", "text": "whole", "chosen": "a", "rejected": "b"}
    _, said = both(lines(tmp_path / "d.jsonl", {"messages": ASKED, **beside}))
    assert "fields that are not used: chosen, prompt, rejected, text" in said
    _, said = both(lines(tmp_path / "d.jsonl", {"messages": ASKED, "prompt": ASKED[0]["content"]}))
    assert "not used" not in said


def test_flags_and_calls_under_other_names(tmp_path):
    called = json.dumps([{"function": {"name": "f", "arguments": {"a": 1}}}])
    rows = [
        {"messages": [ASKED[0], assistant("no", loss=0), ASKED[0], assistant("yes", training=True)]},
        {"messages": [ASKED[0], assistant("", tool_calls=called), {"role": "tool", "content": "2"}, assistant("yes")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "tool_call", "value": '{"name": "f"}'}]},
        {"instruction": "one", "output": "two", "history": ASKED},
        {"messages": ASKED, "chat_template_kwargs": '{"enable_thinking": false}'},
        {"messages": ASKED, "label": False},
    ]
    records, said = both(lines(tmp_path / "d.jsonl", *rows))
    assert [is_learned(m) for m in records[0]["messages"]] == [False, False, False, True]
    assert records[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert records[2]["messages"][1]["tool_calls"] == [{"type": "function", "function": {"name": "f"}}]
    assert records[3]["prompt"] == [*ASKED, {"role": "user", "content": "one"}]
    assert records[4]["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(records) == 5  # the answer with the label false is not learned
    assert "left out, for their label is false (1)" in said


def test_fields_that_nothing_reads_are_named_once(tmp_path):
    records, said = both(lines(tmp_path / "d.jsonl", {"text": "one", "id": 1, "url": None}, {"text": "", "id": 2}))
    assert len(records) == 1
    assert "fields that are not used: id" in said
    assert "1 records have a text without content and were left out, the first in" in said


# -- files

PAIR = {"prompt": "one", "completion": "two"}


def files():
    """Yield names and contents that all hold the same record."""
    text = json.dumps(PAIR)
    yield "plain.jsonl", text.encode()
    yield "bom.jsonl", b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n"
    yield "array.json", json.dumps([PAIR], indent=2).encode()
    yield "lines.json", (text + "\n" + text).encode()
    yield "around.json", json.dumps({"version": 1, "data": [PAIR]}).encode()
    yield "packed.jsonl.gz", gzip.compress(text.encode())
    yield "packed.json.gz", gzip.compress(json.dumps([PAIR]).encode())
    yield "packed.jsonl.zst", pyarrow.compress(text.encode(), codec="zstd", asbytes=True)
    yield "table.csv", b"prompt,completion\none,two\n"
    yield "semicolons.csv", b'prompt;completion\n"one";two\n'
    yield "tabs.tsv", b"prompt\tcompletion\none\ttwo\n"
    yield "wide.csv", "prompt,completion\r\none,two\r\n".encode("utf-16")
    yield "upper.CSV", b"prompt,completion\none,two\n"


@pytest.mark.parametrize(("name", "content"), [pytest.param(*file, id=file[0]) for file in files()])
def test_files_as_people_have_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    records, _ = both(tmp_path / name)
    assert records[0] == PAIR
    with pytest.raises(SpectuneError, match=rf"no such file; did you mean '{name}'"):
        both(tmp_path / f"s{name}")


def test_the_encoding_of_a_table_is_said(tmp_path):
    (tmp_path / "old.csv").write_bytes("prompt;completion\nGrüße;schön\n".encode("cp1252"))
    records, said = both(tmp_path / "old.csv")
    assert records == [{"prompt": "Grüße", "completion": "schön"}]
    assert "was read as Windows-1252" in said


def test_parquet_with_structs_nulls_and_json(tmp_path):
    rows = [{"messages": ASKED, "prompt": None}, {"messages": [*ASKED, assistant("one", name="x")], "prompt": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "structs.parquet")
    datasets.Dataset.from_dict({"conversations": [json.dumps(ASKED)]}).to_parquet(tmp_path / "json.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "stored")
    for source in ("structs.parquet", "stored"):
        records, _ = both(tmp_path / source)
        assert Encoder(make("chatml")).one(records[0]) == Encoder(make("chatml")).one({"messages": ASKED})
    assert both(tmp_path / "json.parquet")[0][0]["messages"] == ASKED


def test_patterns_lists_and_mixtures(tmp_path):
    for part in "abc":
        lines(tmp_path / f"{part}.jsonl", *({"text": f"{part} {i}"} for i in range(4)))
    assert len(both(str(tmp_path / "*.jsonl"))[0]) == 12
    with pytest.raises(SpectuneError, match="no file is named so"):
        both(str(tmp_path / "*.csv"))
    a, b, c = (str(tmp_path / f"{part}.jsonl") for part in "abc")
    mixed = f"data=[{a}, {{path: {b}, weight: 2}}, {{path: {c}, weight: 0.5}}]"
    train_, held = make_task(load_config(None, ["model=m", "output=o", mixed, "held_out=0"])).read()
    texts = [record["text"] for record in train_]
    assert [sum(text[0] == part for text in texts) for part in "ab"] == [4, 8]
    assert 0 < sum(text[0] == "c" for text in texts) < 4
    train_, held = make_task(load_config(None, ["model=m", "output=o", mixed, "held_out=0.3"])).read()
    assert {r["text"] for r in train_}.isdisjoint(r["text"] for r in held)  # what is repeated is not what is held out
    assert len({r["text"] for r in held}) == len(held) == 4
    for wrong, message in (("data=[]", "empty"), (f"data=[{{path: {a}, wieght: 2}}]", "item 1: unknown key 'wieght'")):
        with pytest.raises(SpectuneError, match=message):
            load_config(None, ["model=m", "output=o", wrong])


def test_repeats_and_leaks_are_counted(tmp_path):
    data = lines(tmp_path / "train.jsonl", {"text": "one"}, {"text": "one"}, {"text": "two"})
    dev = lines(tmp_path / "dev.jsonl", {"text": "two"}, {"text": "three"})
    task = make_task(load_config(None, ["model=m", "output=o", f"data={data}", f"eval_data={dev}"]))
    task.read()
    said = " ".join(task.notes)
    assert "1 of 3 training records are repeated" in said
    assert "1 of 2 held-out records are in the training data too" in said


def test_labels_that_differ_in_spaces_alone_are_told(tmp_path):
    rows = [{"text": f"one {i}", "label": label} for i, label in enumerate(["spam", " spam", "Spam", "ham"] * 4)]
    task = make_task(
        load_config(None, ["model=m", "output=o", "task=classify", f"data={lines(tmp_path / 'd.jsonl', *rows)}"])
    )
    task.read()
    assert "' spam', 'Spam', 'spam' are 3 labels" in " ".join(task.notes)


@pytest.mark.parametrize(
    ("task", "name", "row"),
    [
        ("sft", "alpaca.json", {"instruction": "what is one", "input": "", "output": "two"}),
        ("sft", "talk.jsonl.gz", {"conversations": SHARED}),
        ("dpo", "feedback.jsonl", {"prompt": "say", "chosen": [user("say"), assistant("one")],
                                   "rejected": [user("say"), assistant("two")]}),
    ],
)  # fmt: skip
def test_a_run_on_them(tmp_path, task, name, row):
    content = json.dumps([row] * 4) if name.endswith("json") else "\n".join([json.dumps(row)] * 4)
    place = tmp_path / name
    place.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    model = save_folder(tmp_path / "model")
    settings = [f"model={model}", f"data={place}", f"output={tmp_path / 'out'}", f"task={task}", "held_out=0"]
    result = train(
        load_config(None, [*settings, "method=lora:rank=2", "epochs=1", "dtype=fp32", "device=cpu", "batch_size=4"])
    )
    assert result.steps == 1
    assert any(
        float(result.adapter.delta(name).abs().max()) > 0 for name in result.adapter.layers
    )  # the first step learns

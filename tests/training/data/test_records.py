"""Reading, splitting and tokenizing."""

import json

import datasets
import pytest
import yaml

from spectune.errors import SpectuneError
from spectune.training.config import TrainConfig, load_config
from spectune.training.data.encoding import encode_one
from spectune.training.data.records import read
from spectune.training.tasks import make_task
from spectune.training.tasks.classify import Classify
from spectune.training.tasks.sft import Sft, encode
from training.folder import make_tokenizer

SFT = Sft(TrainConfig(model="m", data="d", output="o"))
CLASSIFY = Classify(TrainConfig(model="m", data="d", output="o", task="classify"))
CHAT = {
    "messages": [
        {"role": "user", "content": "say hello"},
        {"role": "assistant", "content": "ahoy"},
        {"role": "user", "content": "what is one plus one"},
        {"role": "assistant", "content": "two"},
    ]
}


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_long_examples_are_cut_and_counted_and_hopeless_ones_dropped():
    tokenizer = make_tokenizer()
    records = [{"prompt": "one " * 20, "completion": "two"}, {"prompt": "one", "completion": "two " * 20}]
    encoded = encode(records, tokenizer, max_length=10)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (1, 2, 1)
    assert len(encoded.examples[0].tokens) == 10


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(SpectuneError, match="max_length=8"):
        encode([{"prompt": "one " * 20, "completion": "two"}], make_tokenizer(), max_length=8)


def test_messages_without_a_template():
    with pytest.raises(SpectuneError, match="no chat template"):
        encode_one(CHAT, make_tokenizer(template=None))


def test_a_template_that_rewrites_earlier_turns():
    rewriting = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(SpectuneError, match="rewrites earlier turns"):
        encode_one(CHAT, make_tokenizer(rewriting))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "one"', "line 2 is not valid JSON"),
        ("[1, 2]", "line 2: not a JSON object"),
        ({"question": "one"}, "line 2: has the keys 'question'; it needs 'messages'"),
        ({"messages": {}}, "line 2: messages must be a list"),
        ({"messages": [{"role": "user", "content": "one"}]}, "line 2: messages has no assistant turn"),
        ({"messages": [{"role": "user"}]}, "line 2: each message needs a role and a content"),
        ({"prompt": "one", "completion": 2}, "line 2: prompt and completion must both be text"),
        ({"text": 5}, "line 2: text must be a string"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    with pytest.raises(SpectuneError, match=message):
        read(write(tmp_path, {"text": "one"}, line), SFT)


def test_an_empty_file_and_a_missing_one(tmp_path):
    with pytest.raises(SpectuneError, match="holds no examples"):
        read(write(tmp_path, "", ""), SFT)
    with pytest.raises(SpectuneError, match="cannot read"):
        read(tmp_path / "none.jsonl", SFT)


def test_the_fields_of_a_csv_file_are_text_as_they_stand(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text('\ufeffprompt,completion\n1+1=,2\n"one, two","None\nor ""null"""\n\nlong,' + "a" * 200_000 + "\n")
    assert read(path, SFT) == [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "one, two", "completion": 'None\nor "null"'},
        {"prompt": "long", "completion": "a" * 200_000},
    ]
    path.write_text("text,label\nNone,007\nnull,1.0\n")
    assert read(path, CLASSIFY) == [{"text": "None", "label": "007"}, {"text": "null", "label": "1.0"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,completion\none,two\none, two,three\n", "row 2: has other columns"),
        (b"prompt,completion\none\n", "row 1: has other columns"),
        (b'prompt,completion\none,"two\n', "it is not CSV"),
        (b"prompt,completion\none,\x81\xff\n", "neither UTF-8 nor Windows-1252 "),
        ("prompt,completion\none,two\n".encode("utf-16-le") + b"\n", "as utf-16-le: .*truncated"),
        (b"prompt,completion,prompt\none,two,three\n", "two columns are named 'prompt'"),
        (b"prompt,completion\n", "holds no examples"),
        (b"", "holds no examples"),
    ],
)
def test_a_broken_csv_file(tmp_path, content, message):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(SpectuneError, match=message):
        read(path, SFT)
    with pytest.raises(SpectuneError, match=r"none\.csv: no such file; did you mean 'data.csv'"):
        read(tmp_path / "none.csv", SFT)


@pytest.fixture
def data_set(tmp_path):
    """A folder of JSONL files, with two configurations."""
    folder = tmp_path / "chats"
    folder.mkdir()
    files = [{"split": "train", "path": "train.jsonl"}, {"split": "validation", "path": "dev.jsonl"}]
    described = [{"config_name": "en", "data_files": files}, {"config_name": "de", "data_files": "de.jsonl"}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n")
    for part in ("train", "dev", "de"):
        (folder / f"{part}.jsonl").write_text(json.dumps({"text": f"{part} one"}) + "\n")
    return folder


@pytest.fixture
def label_set(tmp_path):
    """A folder of Parquet files with named labels."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    for part, last in (("train", 1), ("validation", -1)):
        rows = {"text": [f"{part} {i}" for i in range(3)], "label": [1, 0, last]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "labels" / f"{part}.parquet")
    return tmp_path / "labels"


def read_run(*more):
    return make_task(load_config(None, ["model=m", "output=o", *more])).read()


def test_a_data_set_by_configuration_and_split(data_set):
    settings = [f"data={data_set}", "data_config=en"]
    train, dev = [{"text": "train one"}], [{"text": "dev one"}]
    assert read_run(*settings, "eval_split=validation") == (train, dev)
    assert read_run(*settings, "data_split=validation", "eval_split=train") == (dev, train)
    assert read_run(*settings, f"eval_data={data_set}", "eval_split=validation") == (train, dev)
    assert read_run(*settings, f"eval_data={data_set / 'dev.jsonl'}") == (train, dev)


def test_the_labels_of_a_data_set_have_names(label_set):
    settings = [f"data={label_set}", "task=classify"]
    records, held = read_run(*settings, "eval_split=validation")
    assert [record["label"] for record in records] == ["good", "bad", "good"]
    assert [record["label"] for record in held] == ["good", "bad", -1]
    assert read_run(*settings, "data_split=train[:2]", "held_out=0") == (records[:2], [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Config name is missing"),
        (["data_config=fr"], "'fr' not found"),
        (["data_config=en", "data_split=valid"], 'Unknown split "valid"'),
        (["data_config=en", "eval_split=train"], "on what is trained on"),
        (["data_config=en", "eval_data={data}"], "on what is trained on"),
        (["data={data}/de.jsonl", "eval_data={data}/../chats/de.jsonl"], "on what is trained on"),
        (["data={data}/de.jsonl", "data_split=train"], "de.jsonl is a file; data_config, data_split and eval_split"),
        (["data={data}/de.jsonl", "eval_split=test"], "de.jsonl is a file; data_config, data_split and eval_split"),
        (["data={data}/none.parquet"], "none.parquet: no such file"),
        (["task=reinforce", "environment=chain_sum", "data=null", "data_split=test"], "data_split and environment"),
    ],
)
def test_data_sets_that_cannot_be_read(data_set, more, message):
    more = [text.format(data=data_set) for text in more]
    with pytest.raises(SpectuneError, match=message):
        read_run(f"data={data_set}", "held_out=0", *more)

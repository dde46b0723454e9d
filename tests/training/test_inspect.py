"""What a model will see of data: counts, lengths and pieces by hand, and what is said and drawn of them."""

import json
from html import unescape

import pytest

from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.inspect import caption, inspect, sentences, write_page
from training.folder import save_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("inspected") / "model")


@pytest.fixture
def looked(model, tmp_path):
    """Inspect records, whose file is called data.jsonl."""

    def look(records, *more, show=3):
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, records)))
        pairs = [f"model={model}", f"data={data}", f"output={tmp_path / 'out'}", "held_out=0", *more]
        return inspect(load_config(None, pairs), show)

    return look


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_counts_and_lengths_by_hand(looked):
    """Each word is a token, and an end of text follows."""
    records = [pair("say", "one"), pair("say the", "one"), pair("say", "one"), pair("what is", "one and two")]
    part = looked(records, "max_length=16")["training"]
    assert (part["records"], part["examples"], part["repeated"]) == (4, 4, 1)
    assert part["lengths"] == {"least": 3, "median": 3.5, "95%": 6, "most": 6}
    assert (part["tokens"], part["learned_tokens"]) == (3 + 4 + 3 + 6, 2 + 2 + 2 + 4)
    assert (part["cut"], part["dropped"], part["first_cut"], part["first_dropped"]) == (0, 0, [], [])


def test_what_is_cut_counts_up_to_the_limit(looked, tmp_path):
    records = [pair("say", "one two three " * 3), pair("say the " * 4, "one"), pair("say", "one")]
    part = looked(records, "max_length=8")["training"]
    assert (part["tokens"], part["learned_tokens"]) == (8 + 8 + 3, 7 + 0 + 2)
    assert part["first_cut"] == [{"where": f"{tmp_path / 'data.jsonl'}, line 1", "tokens": 11}]
    assert part["first_dropped"] == [
        {"where": f"{tmp_path / 'data.jsonl'}, line 2", "why": "its answer begins at token 9 of 8"}
    ]


def test_only_the_first_of_many_are_named(looked):
    part = looked([pair("say", "one two three " * n) for n in range(3, 18)], "max_length=8")["training"]
    assert (part["cut"], len(part["first_cut"])) == (15, 10)


def test_the_pieces_are_the_text_and_what_of_it_is_learned(looked):
    messages = [
        {"role": "user", "content": "say one"}, {"role": "assistant", "content": "ahoy one"},
        {"role": "user", "content": "and two"}, {"role": "assistant", "content": "ahoy two", "weight": 0},
    ]  # fmt: skip
    document = looked([{"messages": messages}, pair("say", "one")], "max_length=32", show=1)
    (record,) = document["examples"]
    (example,) = record["examples"]
    said = [(piece["text"].strip(), piece["learned"]) for piece in example["pieces"]]
    assert said[:2] == [("<s> user say one </s> <s> assistant", False), ("ahoy one </s>", True)]
    assert [learned for _, learned in said] == [False, True, False][: len(said)]
    assert (example["learned"], example["cut_at"]) == (3, None)


def test_held_out_records_that_are_learned_too_are_leaks(looked, tmp_path):
    dev = tmp_path / "dev.jsonl"
    dev.write_text("\n".join(map(json.dumps, [pair("say", "one"), pair("say", "two"), pair("say", "one")])))
    document = looked([pair("say", "one"), pair("say", "three")], f"eval_data={dev}", "max_length=8")
    assert (document["leaks"], document["held_out"]["records"], document["held_out"]["repeated"]) == (2, 3, 1)


def test_labels_are_counted_and_texts_are_whole(looked):
    records = [{"text": "say one", "label": label} for label in ("a", "b", "a")]
    document = looked(records, "task=classify", "max_length=8")
    assert document["training"]["labels"] == {"a": 2, "b": 1}
    assert document["training"]["dropped"] == 0
    assert document["examples"][1]["label"] == "b"


def test_rollouts_are_not_looked_at(model, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "say"}))
    pairs = [f"model={model}", f"data={tmp_path / 'data.jsonl'}", "output=out", "task=reinforce", "reward=a:b"]
    with pytest.raises(SpectuneError, match="its prompts can be looked at as task: sft"):
        inspect(load_config(None, pairs))


def test_what_is_cut_and_left_out_in_sentences():
    first = {"cut": 2, "first_cut": [{"where": "a.jsonl, line 3", "tokens": 99}], "dropped": 0, "first_dropped": []}
    other = {"cut": 0, "first_cut": [], "dropped": 1, "first_dropped": [{"where": "b, line 1", "why": "it is empty"}]}
    document = {"limit": 64, "notes": ["a note"], "training": first, "held_out": other}
    assert sentences(document) == [
        "a note",
        "2 training examples are cut to 64 tokens, the first a.jsonl, line 3 with 99",
        "1 held-out examples are left out, the first b, line 1: it is empty",
    ]
    assert sentences({"limit": 64, "notes": []}) == []


def test_which_example_of_which_record():
    example = {"tokens": 7, "learned": 2, "cut_at": None}
    assert caption({"where": "a, line 1"}, example, 1, 1) == "a, line 1: 7 tokens, 2 learned"
    assert caption({"where": "a, line 1", "label": "x"}, {**example, "cut_at": 5}, 2, 3) == (
        "a, line 1, example 2 of 3: 7 tokens, 2 learned, cut at 5, label 'x'"
    )


def test_the_page(looked, tmp_path):
    write_page(looked([pair("say <unk>", "one"), pair("say", "one two " * 4)], "max_length=8"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "one &lt;/s&gt;</mark>" in page
    assert "say <unk>" in unescape(page)
    assert "data.jsonl, line 2 with 10" in page
    write_page(looked([{"text": "say one"}], "max_length=8"), tmp_path / "page.html")
    assert "Nothing is cut, left out or repeated." in (tmp_path / "page.html").read_text(encoding="utf-8")

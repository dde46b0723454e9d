"""The demo's data and measures: what is asked, what counts as a pirate's, and whether a new process says the same."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from spectune import demo
from spectune.bases import sources
from spectune.errors import SpectuneError


def reply(text, tokens=()):
    return SimpleNamespace(text=text, tokens=list(tokens))


def test_pirate_words_are_those_that_nobody_says_in_films():
    assert demo.pirate_rate(["Ahoy, matey! The ship"]) == 0.5  # of four words
    assert demo.pirate_rate(["the ship is here", "where is it"]) == 0.0
    assert demo.pirate_rate(["ahoy", "is it"]) == pytest.approx(1 / 3)  # over all words, and not over replies
    assert demo.pirate_rate([]) == demo.pirate_rate(["", "..."]) == 0.0
    said = [word for _, line in sources.dialogue() for word in demo._words(line)]
    assert all(said.count(word) / len(said) < 1e-4 for word in sorted(demo._pirate_words())[:20])


def test_words_are_in_small_letters_and_whole():
    assert demo._words("Don't mutter: 'tis a ship-shape DAY 4 'em") == [
        "don't", "mutter", "tis", "a", "ship-shape", "day", "em"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [("One. Two", "One."), ("One. Two.\nThree", "One. Two."), ("One", ""), ("One\ntwo.", "One two."), ("", "")],
)
def test_a_reply_is_taken_as_far_as_its_sentences_are_whole(text, found):
    assert demo._sentences(text) == found


def test_questions_are_as_a_person_types_them():
    found = demo._questions()
    assert len(found) > 1000
    assert all(4 <= len(question.split()) <= 12 for question in found)
    assert not any(mark in question for question in found for mark in ("``", " ?", " ,", " 's"))


@pytest.fixture
def answered(monkeypatch):
    """Answer questions without a model; every third reply has nothing of the sea in it."""
    asked: list[str] = []

    def generate(model, tokenizer, prompts, max_new_tokens):
        asked.extend(prompts)
        return [reply("It is here. And" if len(prompt) % 3 else "Hello my friend. And") for prompt in prompts]

    monkeypatch.setattr(demo, "generate", generate)
    monkeypatch.setattr(demo, "translate", lambda text: "ahoy matey" if text.startswith("Hello") else text)
    return asked


def test_pairs_are_salty_apart_and_alike_for_a_seed(answered):
    none: Any = None
    random.seed(5)
    state, told = random.getstate(), []
    data = demo.pirate_data(none, none, 20, 7, seed=1, progress=lambda *so_far: told.append(so_far))
    assert random.getstate() == state
    assert (len(data.train), len(data.held)) == (20, 7)
    questions = [record["messages"][0]["content"] for record in [*data.train, *data.held]]
    assert len(set(questions)) == 27
    assert {record["messages"][1]["content"] for record in [*data.train, *data.held]} == {"ahoy matey"}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (27, 27)
    again = demo.pirate_data(none, none, 20, 7, seed=1)
    assert again == data
    assert demo.pirate_data(none, none, 20, 7, seed=2) != data


def test_where_there_are_too_few_questions_all_are_taken(answered, monkeypatch):
    none: Any = None
    monkeypatch.setattr(demo, "_questions", lambda: ["a b c d", "a b c de", "a b c def"])
    data = demo.pirate_data(none, none, 20, 7)
    assert (len(data.train), len(data.held)) == (1, 0)


def test_the_state_of_random_numbers_comes_back_where_asking_fails(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(demo, "generate", broken)
    none: Any = None
    random.seed(5)
    state = random.getstate()
    with pytest.raises(RuntimeError):
        demo.pirate_data(none, none, 2, 1)
    assert random.getstate() == state


def test_the_package_translates():
    random.seed(0)
    assert demo.pirate_rate([demo.translate("Hello, my friend, where is the money?")]) > 0.1


@pytest.mark.parametrize(
    ("done", "told"),
    [
        ({"returncode": 0, "stdout": json.dumps([{"tokens": [1, 2]}, {"tokens": [3]}])}, None),
        (
            {"returncode": 0, "stdout": json.dumps([{"tokens": [1, 2]}, {"tokens": [4]}])},
            "a new process with the saved adapter gave other tokens",
        ),
        ({"returncode": 2, "stderr": "no such file\n"}, "a new process could not use the adapter: no such file"),
    ],
)
def test_a_new_process_must_say_the_same(done, told, monkeypatch, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(**done)

    monkeypatch.setattr(demo.subprocess, "run", run)
    config: Any = SimpleNamespace(model="tiny")
    expected: Any = [reply("", [1, 2]), reply("", [3])]
    if told is None:
        demo._check_new_process(config, tmp_path, "torch.float32", ["a", "b"], expected)
    else:
        with pytest.raises(SpectuneError) as failed:
            demo._check_new_process(config, tmp_path, "torch.float32", ["a", "b"], expected)
        assert str(failed.value) == told
    (command,) = commands
    assert command[2:8] == ["spectune", "generate", "tiny", "a", "b", "-a"]
    assert command[command.index("--dtype") + 1] == "float32"

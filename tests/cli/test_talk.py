"""What can be typed in a conversation, on a tiny model."""

import json

import pytest
from rich.console import Console

import spectune
from spectune.cli.talk import Talk
from spectune.errors import SpectuneError
from training.folder import make_model, make_tokenizer


@pytest.fixture
def talk(capsys):
    model = make_model()
    for name, scale in (("a-pirate-0", 5.0), ("a-chef-1", -5.0)):
        spectune.adapt(model, spectune.LoRA(rank=2), name=name)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.normal_(generator=None).mul_(scale)
    spectune.activate(model, {"a-pirate-0": 1.0, "a-chef-1": 0.5})
    return Talk(model.eval(), make_tokenizer(), None, {"max_new_tokens": 3, "seed": 0}, Console(stderr=True))


def said(talk, capsys, line):
    talk.hear(line)
    return capsys.readouterr().out.strip()


def test_base_adapter_mixtures_and_both(talk, capsys):
    mixed = said(talk, capsys, "say one")
    said(talk, capsys, "/reset")
    said(talk, capsys, "/base")
    base = said(talk, capsys, "say one")
    said(talk, capsys, "/reset")
    said(talk, capsys, "/adapter")
    assert said(talk, capsys, "say one") == mixed
    said(talk, capsys, "/reset")
    said(talk, capsys, "/both")
    assert said(talk, capsys, "say one").splitlines() == [*base.splitlines(), *mixed.splitlines()]
    said(talk, capsys, "/reset")
    said(talk, capsys, "/mix pirate 0 chef 0")
    assert said(talk, capsys, "say one") == base


def test_history_is_shown_saved_and_forgotten(talk, capsys, tmp_path):
    reply = said(talk, capsys, "say one")
    assert said(talk, capsys, "/history").split() == f"user: say one assistant: {reply}".split()
    talk.hear(f"/save {tmp_path / 'talk.jsonl'}")
    (line,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]
    talk.hear("/reset")
    assert said(talk, capsys, "/history") == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/mix pirat 1", "did you mean 'pirate'"),
        ("/mix pirate much", "is no weight"),
        ("/mix", "names with weights"),
        ("/histroy", "did you mean 'history'"),
        ("/save", "takes a file"),
    ],
)
def test_what_is_not_understood_is_told(talk, line, message):
    with pytest.raises(SpectuneError, match=message):
        talk.hear(line)

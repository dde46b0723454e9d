"""`spectune init`: a file that runs, and says what `train` does without it."""

import json

import pytest
import yaml

from cli.test_commands import fails, run
from training.folder import WORDS, save_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"say {WORDS[i % 10]} {WORDS[i // 10]}", "completion": f"ahoy {WORDS[i % 9]}"} for i in range(80)
    ]
    (tmp_path / "my chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_what_init_writes_trains_and_is_what_train_chooses(model, place):
    told = run("init", "my chats.jsonl", "-m", model, "max_steps=2")
    assert f"next: spectune train {place / 'run.yaml'}" in " ".join(told.stderr.split())
    text = (place / "run.yaml").read_text()
    written = yaml.safe_load(text)
    assert written["output"] == str(place / "runs" / "my-chats")
    assert "# 95% of the examples have at most" in text
    common = ["--json", "dtype=fp32", "device=cpu"]
    first = json.loads(run("train", "run.yaml", *common).stdout)
    plain = [f"model={model}", "data=my chats.jsonl", "output=other", "max_steps=2"]
    assert json.loads(run("train", *plain, *common).stdout)["held_out_after"] == first["held_out_after"]


def test_init_replaces_nothing_and_names_what_is_wrong(monkeypatch, capsys, model, place):
    run("init", "my chats.jsonl", "-m", model)
    assert "give --overwrite" in fails(monkeypatch, capsys, "init", "my chats.jsonl", "-m", model)
    asked = ["init", "my chats.jsonl", "-m", model, "--overwrite", "--json", "lr=1e-3"]
    document = json.loads(run(*asked).stdout)
    assert document["settings"]["lr"] == {"value": 1e-3, "reason": "as given"}
    assert document["summary"].startswith("80 records, 95% of the examples have at most")
    assert "did you mean 'my chats.jsonl'" in fails(
        monkeypatch, capsys, "init", "my chat.jsonl", "-m", model, "--out", "b"
    )
    assert "did you mean 'epochs'" in fails(monkeypatch, capsys, *asked[:4], "--overwrite", "epoch=3")

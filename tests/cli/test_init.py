"""`spectune init`: a file that runs, and says what `train` does without it."""

import json

import pytest
import yaml

from cli.typed import fails, run
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
    inside = fails(monkeypatch, capsys, *asked[:4], "--out", "my chats.jsonl/run.yaml")
    assert "my chats.jsonl/run.yaml cannot be written" in inside


def test_eval_shows_base_and_adapter_and_a_run_is_a_model(monkeypatch, capsys, model, place):
    common = ["dtype=fp32", "device=cpu", "lr=5e-2", "method=lora:rank=4", "--json"]
    trained = json.loads(run("train", f"model={model}", "data=my chats.jsonl", "output=out", *common).stdout)
    (place / "own.txt").write_text("say one\n")
    document = json.loads(run("eval", "out", "--prompts", "own.txt", "--html", "page.html", "--json").stdout)
    assert document["measures"]["base"]["loss"] == pytest.approx(trained["held_out_loss_before"], abs=1e-4)
    assert document["measures"]["adapter"]["loss"] == pytest.approx(trained["held_out_loss_after"], abs=1e-4)
    assert [reply["prompt"] for reply in document["replies"]][-1] == "say one"
    assert len(document["replies"]) == 5
    assert "Side by side" in (place / "page.html").read_text()
    shown = run("eval", "out", "--examples", "1", "--data", "my chats.jsonl")
    assert "on 80 held-out records the adapter is better than its base" in shown.stdout
    assert f"next: spectune chat {place / 'out'}" in " ".join(shown.stderr.split())
    asked = ["say one", "--max-new-tokens", "4", "--json"]
    assert run("generate", "out", *asked).stdout == run("generate", model, "-a", "out", *asked).stdout
    assert "cannot be written" in fails(monkeypatch, capsys, "eval", "out", "--html", "own.txt/page.html")
    assert "it has no config.yaml" in fails(monkeypatch, capsys, "eval", model)
    assert "pip install lm_eval" in fails(monkeypatch, capsys, "eval", "out", "--tasks", "piqa")

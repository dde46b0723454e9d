"""A run's folder in the place of a model with an adapter, from anywhere; and what each command names next."""

import json
import shlex
from pathlib import Path

import pytest

import spectune
from cli.typed import fails, run
from training.folder import WORDS, save_folder

TRAINED = ["dtype=fp32", "device=cpu", "max_steps=2", "batch_size=2", "max_length=16", "method=lora:rank=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a run that was named by relative paths."""
    place = tmp_path_factory.mktemp("first")
    save_folder(place / "model")
    rows = [{"prompt": f"say {WORDS[i % 10]}", "completion": f"ahoy {WORDS[i % 9]}"} for i in range(20)]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        told = run("train", "model=model", "data=chats.jsonl", "output=runs/chats", *TRAINED)
        run("train", "model=model", "data=chats.jsonl", "output=runs/again", *TRAINED)
    assert following(told) == ["eval", str(place / "runs" / "chats")]
    return place


@pytest.fixture
def chats(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return place / "runs" / "chats"


def following(result):
    """Return the arguments of the command that is named next."""
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("next: "))
    name, *words = shlex.split(line.removeprefix("next: "))
    assert name == "spectune"
    return words


def test_eval_reads_the_run_and_its_data_from_anywhere(chats):
    told = run("eval", str(chats), "--examples", "1", "--device", "cpu")
    assert following(told) == ["chat", str(chats)]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_talks_names_the_export_that_works(chats, tmp_path, command):
    run("compose", "sum", f"{chats}:0.5", str(chats.with_name("again")))
    asked = ["--max-new-tokens", "2", "--device", "cpu"]
    told = run(command, "sum", *(["say one"] if command == "generate" else []), *asked, stdin="say one\n")
    assert following(told) == ["export", str(tmp_path / "sum"), str(tmp_path / "sum-merged"), "--format", "merged"]
    merged = run(*following(told))
    assert following(merged) == ["chat", str(tmp_path / "sum-merged")]
    run(*following(merged), *asked, stdin="say one\n")


def test_export_names_what_reads_it(chats, tmp_path):
    talk = following(run("export", str(chats), "lora"))
    assert talk == ["chat", str(tmp_path / "lora")]
    assert following(run(*talk, "--max-new-tokens", "2", stdin="say one\n"))[:2] == ["export", str(tmp_path / "lora")]
    told = run("export", str(chats), "served", "--to", "vllm").stderr.splitlines()[-1]
    model, served = chats.parents[1] / "model", tmp_path / "served"
    assert told == f"next: vllm serve {model} --enable-lora --lora-modules served={served}"


def test_a_plan_takes_the_settings_of_the_run(chats):
    told = run("plan", str(chats), "--no-measure")
    found = json.loads(run("plan", str(chats), "--no-measure", "--json").stdout)
    assert [row["method"] for row in found["rows"]] == ["lora:rank=2"]
    assert (found["batch"]["rows"], found["batch"]["length"], list(found["floor_seconds"])) == (2, 16, ["fp32"])
    assert found["rows"][0]["trainable_parameters"] == spectune.Adapter.load(chats).parameter_count()
    assert following(told) == ["eval", str(chats)]
    others = ["-m", "svf", "--batch-size", "3", "-p", "bf16", "--no-measure", "--json"]
    other = json.loads(run("plan", str(chats), *others).stdout)
    assert [row["method"] for row in other["rows"]] == ["svf"]
    assert other["batch"]["rows"] == 3


def test_a_spectrum_is_of_the_base_with_the_adapter(chats, monkeypatch, capsys):
    arguments = ["--ranks", "1", "4", "--rank", "2"]
    told = run("spectrum", str(chats), "--out", "spectrum", *arguments)
    document = json.loads(Path("spectrum", "spectrum.json").read_text())
    assert document["adapter"]["folder"] == str(chats)
    assert document["model"] == str(chats.parents[1] / "model")
    assert following(told)[:2] == ["train", str(Path("spectrum", "overrides.yaml").resolve())]
    said = fails(monkeypatch, capsys, "spectrum", str(chats), "-a", str(chats), "--out", "other", *arguments)
    assert "leave -a out" in said


def test_a_library_takes_runs_and_is_no_place_for_another_adapter(chats, monkeypatch, capsys):
    first = run(
        "library", "add", "skills", str(chats), "--base", str(chats), "--prompts", str(chats.parents[1] / "chats.jsonl")
    )
    library = str(Path("skills").resolve())
    assert following(first) == ["chat", str(chats.parents[1] / "model"), "--library", library]
    second = run(
        "library", "add", "skills", str(chats.with_name("again")), "--prompts", str(chats.parents[1] / "chats.jsonl")
    )
    assert following(second) == ["library", "train-classifier", library]
    said = fails(monkeypatch, capsys, "generate", str(chats), "say one", "--library", "skills", "--strategy", "prompt")
    assert f"`spectune library add skills {chats}`" in said


def test_a_run_is_served_as_its_base_with_the_adapter_by_the_name_of_its_folder(chats, monkeypatch):
    pytest.importorskip("uvicorn")
    served = {}

    def serve(model, tokenizer, sources, *, name, **others):
        served.update({"name": name, "adapters": {key: read() for key, read in sources.items()}})

    monkeypatch.setattr("spectune.serving.run.serve", serve)
    run("serve", str(chats), "-a", f"other={chats.with_name('again')}", "--port", "0")
    assert served["name"] == str(chats.parents[1] / "model")
    assert list(served["adapters"]) == ["chats", "other"]


def test_a_run_that_has_not_ended_is_told_how_to_go_on(place, tmp_path, monkeypatch, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    text = (place / "runs" / "chats" / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(text)
    for words in (["export", str(unfinished), "out"], ["compose", "out", str(unfinished)], ["chat", str(unfinished)]):
        said = fails(monkeypatch, capsys, *words)
        assert "its run has not ended" in said
        assert f"{unfinished / 'config.yaml'} resume=true" in said
    planned = run("plan", str(unfinished), "--no-measure")
    assert following(planned) == ["train", str(unfinished / "config.yaml"), "resume=true"]


def test_what_is_stopped_goes_on_from_anywhere(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    from spectune.training.progress import Interrupted

    def stop(config, console):
        raise Interrupted("interrupted at step 1")

    with monkeypatch.context() as patch:
        patch.setattr("spectune.training.run.train", stop)
        told = run("train", "model=model", "data=chats.jsonl", "output=runs/stopped", *TRAINED, code=130)
    assert following(told) == ["train", str(place / "runs" / "stopped" / "config.yaml"), "resume=true"]
    run("train", "model=model", "data=chats.jsonl", "output=runs/stopped", *TRAINED, "save_steps=1")
    monkeypatch.chdir(tmp_path)
    run(*following(told), "max_steps=3")  # which finds the model, the data and its checkpoint


def test_a_folder_of_an_adapter_is_no_base(chats, monkeypatch, capsys):
    said = fails(monkeypatch, capsys, "init", str(chats.parents[1] / "chats.jsonl"), "-m", str(chats))
    assert "holds an adapter and no model" in said
    assert "did you mean 'chats'" in fails(monkeypatch, capsys, "export", str(chats.with_name("chat")), "out")

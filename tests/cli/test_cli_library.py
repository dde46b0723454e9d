"""spectune library, and generate and chat with one, as a user types them."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import spectune
from cli.typed import fails, run
from transformer2 import cases

WORDS = ["one", "two", "three", "four"]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Folders of two adapters, with the prompts of each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, method) in enumerate((("ahoy", "svf"), ("plus", "lora:rank=2"))):
        base, _ = spectune.load_base(model, "fp32")
        cases.adapter(method, seed, model=base).save(folder / name)
        lines = [{"prompt": f"{name} {a} {b}", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def library(runs, tmp_path):
    path = str(tmp_path / "library")
    for name in ("ahoy", "plus"):
        added = json.loads(
            run("library", "add", path, str(runs / name), "--prompts", str(runs / f"{name}.jsonl"), "--json").stdout
        )
        assert added["prompts"] == 16
    return path


def test_add_ls_and_rm(library, runs, model):
    described = ("--name", "third", "--description", "is for three", "--base", model)
    run("library", "add", library, str(runs / "ahoy"), *described)
    listed = json.loads(run("library", "ls", library, "--json").stdout)
    assert [a["name"] for a in listed["adapters"]] == ["ahoy", "plus", "third"]
    assert listed["adapters"][2]["description"] == "is for three"
    assert listed["base_model"] == model
    assert "3 adapters" in run("library", "ls", library).stdout
    assert json.loads(run("library", "rm", library, "third", "--json").stdout)["left"] == ["ahoy", "plus"]


def test_descriptions_are_shown_as_they_are(library, runs):
    added = run("library", "add", library, str(runs / "plus"), "--name", "llama", "--description", "llama [/INST] text")
    assert "added llama" in added.stdout
    assert "[/INST]" in run("library", "ls", library).stdout
    assert "removed llama: 2" in run("library", "rm", library, "llama", "llama").stdout


def test_an_adapter_that_cannot_know_its_base_is_told(runs, tmp_path, model):
    path, folder = str(tmp_path / "loras"), shutil.copytree(runs / "plus", tmp_path / "plus")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})  # as PEFT writes it: no sketch of W
    assert "with --base NAME" in run("library", "add", path, str(folder)).stdout
    run("library", "add", path, str(folder), "--name", "other", "--base", model)
    assert "with --base NAME" not in run("library", "add", path, str(folder), "--name", "third").stdout
    told = run("library", "add", str(tmp_path / "knows"), str(runs / "plus")).stdout
    assert "with --base NAME" not in told  # its own files say


def test_generate_and_chat_say_who_answers(library, model):
    command = ["generate", model, "ahoy one two", "--library", library, "--max-new-tokens", "3"]
    (reply,) = json.loads(run(*command, "--json").stdout)
    assert reply["label"] in ("ahoy", "plus", "none")
    assert set(reply["scores"]) == {"ahoy", "plus", "none"}
    assert " sure]" in run(*command).stderr
    result = run("chat", model, "--library", library, "--strategy", "prompt", stdin="ahoy one\n/quit\n")
    assert " sure]" in result.stderr
    assert result.stdout.strip()


def test_train_classifier_and_use_it_by_default(library, model, tmp_path):
    others = tmp_path / "others.txt"
    others.write_text("\n".join(f"hello the {a} and {b}" for a in WORDS for b in WORDS))
    report = json.loads(run("library", "train-classifier", library, "--none", str(others), "--json").stdout)
    assert report["labels"] == ["ahoy", "plus", "none"]
    assert report["accuracy"] > 0.5
    assert "held-out prompts go to their adapter" in run("library", "train-classifier", library).stdout
    (reply,) = json.loads(
        run("generate", model, "plus two one", "--library", library, "--max-new-tokens", "2", "--json").stdout
    )
    assert set(reply["scores"]) == {"ahoy", "plus"}


def test_mix_saves_an_adapter(library, runs, model, tmp_path):
    out = tmp_path / "mix"
    command = ["library", "mix", library, str(runs / "plus.jsonl"), str(out), "--by", "projection"]
    found = json.loads(run(*command, "--iterations", "2", "--population", "4", "--elites", "2", "--json").stdout)
    assert set(found["weights"]["q_proj"]) == {"ahoy", "plus"}
    assert spectune.Adapter.load(out).layers
    run("generate", model, "plus one two", "-a", str(out), "--max-new-tokens", "2")
    assert "saved in" in run(*command[:4], str(tmp_path / "other"), "--search", "gradient", "--iterations", "2").stdout


def test_few_shot_answers_with_a_mixture(library, runs, model, tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text("\n".join((runs / "plus.jsonl").read_text().splitlines()[:3]))
    command = ["generate", model, "plus one two", "--library", library, "--shots", str(shots), "--max-new-tokens", "2"]
    (reply,) = json.loads(run(*command, "--json").stdout)
    assert set(reply["weights"]) == {"ahoy", "plus"}


def test_mistakes_are_one_sentence_and_code_2(monkeypatch, capsys, library, runs, model, tmp_path):
    def says(*arguments):
        return fails(monkeypatch, capsys, *arguments)

    assert "has an adapter 'ahoy' already" in says("library", "add", library, str(runs / "ahoy"))
    assert "did you mean 'ahoy'" in says("library", "rm", library, "ahoi")
    assert "there is no library" in says("library", "ls", str(tmp_path / "none"))
    assert "has no classifier" in says("generate", model, "say", "--library", library, "--strategy", "classifier")
    assert "belong together" in says("generate", model, "say", "--library", library, "--strategy", "few-shot")
    both = ("--library", library, "-a", str(runs / "ahoy"))
    assert "not both" in says("chat", model, *both)
    for command in (("generate", model, "say"), ("chat", model)):
        assert "--strategy say how a library's adapters" in says(*command, "--strategy", "prompt")
        assert "--strategy must be one of prompt, classifier, few-shot" in says(
            *command, "--library", library, "--strategy", "clasifier"
        )
    assert "there is no adapter folder" in says("library", "add", str(tmp_path / "new"), str(tmp_path / "gone"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "holds no prompts" in says("library", "train-classifier", library, "--none", str(empty))

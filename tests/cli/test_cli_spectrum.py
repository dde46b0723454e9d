"""The command as a user types it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import spectune
from spectune.cli import app, main

runner = CliRunner()


@pytest.fixture
def model(tmp_path):
    save_file({f"layers.{i}.up.weight": torch.randn(30, 20) for i in range(3)}, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_json_is_one_document_on_stdout(model, tmp_path):
    arguments = ["spectrum", model, "--out", str(tmp_path / "out"), "--json", "--range", "1", "9", "--exclude", "0.up"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["range"] == [1, 9]
    assert [row["layer"] for row in document["matrices"]] == [1, 2]
    assert "100%" in result.stderr


def test_the_answer_is_shown(model, tmp_path):
    result = runner.invoke(app, ["spectrum", model, "--out", str(tmp_path / "out"), "--targets", "up"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "of the 60 singular values of model.safetensors lie between 0.1 and 1.1" in words
    assert f"saved {tmp_path / 'out' / 'spectrum.html'}" in words


def test_layers_of_an_adapter_that_have_no_matrix_are_told(model, tmp_path):
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(20, 30, bias=False)}) for _ in range(3))
    base = torch.nn.ModuleDict({"layers": blocks})
    base.load_state_dict(load_file(model))
    adapted = spectune.adapt(base, "lora:rank=1")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    spectune.extract(adapted).save(tmp_path / "adapter")
    arguments = ["spectrum", model, "--out", str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")]
    result = runner.invoke(app, [*arguments, "--exclude", "1.up"])
    assert result.exit_code == 0, result.output
    says = "1 of the adapter's layers left out, the first layers.1.up: not among the measured matrices"
    assert says in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--targets", "upp"], "'upp' matches no linear layer; did you mean 'up'"),
        (["--range", "2", "1"], "0 < low < high"),
        (["--method", "lorra"], "unknown method 'lorra'; did you mean 'lora'"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(monkeypatch, capsys, model, tmp_path, arguments, says):
    monkeypatch.setattr(sys, "argv", ["spectune", "spectrum", model, "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert says in " ".join(said.err.split())
    assert "Traceback" not in said.err


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys, model, tmp_path):
    from spectune.spectrum import collect

    def interrupted(W):
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "singular_values", interrupted)
    monkeypatch.setattr(sys, "argv", ["spectune", "spectrum", model, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "the same command goes on" in " ".join(capsys.readouterr().err.split())

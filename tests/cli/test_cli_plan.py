"""`spectune plan` as a user types it."""

import json
import sys

import pytest
from typer.testing import CliRunner

from spectune.cli import app, main
from training.folder import make_model

QUICK = ["--length", "8", "--batch-size", "2", "--no-measure"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("m")
    make_model().config.save_pretrained(path)
    return str(path)


def run(*arguments):
    result = CliRunner().invoke(app, ["plan", *arguments, *QUICK], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_json_is_one_document(folder):
    found = json.loads(run(folder, "-m", "svf", "-m", "lora:rank=2", "--devices", "1-2", "--json"))
    assert [row["method"] for row in found["rows"]] == ["svf", "lora:rank=2"]
    assert {"trainable_parameters", "adapter_bytes", "setup_seconds", "precisions"} <= found["rows"][0].keys()
    assert set(found["rows"][0]["precisions"]) == {"fp32", "bf16", "4bit"}
    assert set(found["rows"][0]["precisions"]["bf16"]["memory"]) == {"1", "2"}


def test_the_table_is_readable_at_80_columns(folder):
    text = run(folder, "-m", "svf", "-m", "dora:inner=svf", "--memory", "1GB", "--budget", "10k")
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in text for word in ("method", "trained", "file", "memory", "step", "svf", "dora:inner=svf"))


def test_devices_have_columns(folder):
    assert "on 4" in run(folder, "-m", "svf", "--devices", "1,4", "-p", "fp32")


def test_overrides_and_targets(folder):
    arguments = ["-m", "svf", "--targets", "q_proj", "--targets", "v_proj", "--override", "v_proj=null", "--json"]
    assert json.loads(run(folder, *arguments))["rows"][0]["layers"] == 2


def test_mistakes_are_one_sentence_and_code_2(monkeypatch, capsys, folder):
    def says(*arguments):
        monkeypatch.setattr(sys, "argv", ["spectune", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "unknown model 'gemma-3b'; did you mean" in says("gemma-3b")
    assert "'1 apple' is not a size" in says(folder, "--memory", "1 apple")
    assert "is not PATTERN=METHOD" in says(folder, "--override", "v_proj")
    assert "devices: 'some'" in says(folder, "--devices", "some")

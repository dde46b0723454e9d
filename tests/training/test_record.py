"""What a run folder says, and which settings make a resumed run another one."""

import json
from datetime import datetime

import pytest

from spectune.errors import SpectuneError
from spectune.training.record import digest
from training.test_run import run


def test_resuming_with_another_method_is_refused(settings, tmp_path):
    output = f"output={tmp_path / 'out'}"
    run(settings, output, "max_steps=5", "method=svf")
    with pytest.raises(SpectuneError, match="with another method"):
        run(settings, output, "max_steps=10", "method=lora:rank=2", "resume=true")


def test_the_run_folder_says_what_was_run(settings, tmp_path):
    run(settings, f"output={tmp_path / 'out'}", "max_steps=1")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.yaml", "run.json", "README.md", "log.jsonl", "curve.png"} <= names
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["data"]["examples"] == 40
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nbase_model: ")


def test_resuming_says_what_changed_and_refuses_another_run(settings, tmp_path, capsys):
    output = f"output={tmp_path / 'out'}"
    run(settings, output, "max_steps=5")
    with pytest.raises(SpectuneError, match="with another batch_size, seed"):
        run(settings, output, "max_steps=10", "resume=true", "seed=1", "batch_size=2")
    run(settings, output, "max_steps=6", "resume=true", "lr=0.5")
    assert "resuming with changed lr, max_steps" in capsys.readouterr().err


def test_resuming_with_other_data_is_refused(settings, tmp_path):
    output, data = f"output={tmp_path / 'out'}", tmp_path / "data.jsonl"
    run(settings, output, "max_steps=5")
    text = data.read_text()
    data.write_text(text.replace("ahoy three", "ahoy four"))
    with pytest.raises(SpectuneError, match=r"out: the data changed since its run began; .*overwrite=true or another"):
        run(settings, output, "max_steps=6", "resume=true")
    data.write_text(text + "\n")
    assert run(settings, output, "max_steps=6", "resume=true").steps == 6


def test_rows_with_dates_have_a_digest():
    day = {"text": "ahoy", "said": datetime(2020, 1, 1)}
    assert digest([day]) == digest([dict(day)]) != digest([{**day, "said": datetime(2020, 1, 2)}])
    assert digest([{"text": "ahoy", "picture": object()}]) == digest([{"text": "ahoy", "picture": object()}])

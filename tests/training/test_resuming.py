"""What a run goes on from: the settings of the run that was begun, its last checkpoint, an adapter's method."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from spectune import LoRA, SpectuneError
from spectune.adapters.contents import Contents
from spectune.adapters.terms import LayerUpdate, Term
from spectune.methods import parse
from spectune.training.config import load_config
from spectune.training.record import write_run
from spectune.training.resuming import (
    as_before,
    last_checkpoint,
    measured_before,
    report_changes,
    step_of,
    with_its_method,
)

RECORDS = [{"prompt": "say", "completion": "ahoy"}], [{"prompt": "say it", "completion": "ahoy"}]


def config(*pairs):
    return load_config(None, ["model=m", "data=d.jsonl", "output=out", *pairs])


def begun(folder, *pairs, parts=RECORDS):
    """Write what a run's folder says of it."""
    write_run(config(*pairs), folder, parts, {})
    return folder


def told(*arguments):
    """Return what is said of the changes."""
    console = Console(record=True, quiet=False, width=200, force_terminal=False)
    with console.capture() as captured:
        report_changes(*arguments, console)
    return captured.get()


def test_settings_that_follow_the_data_are_those_of_the_run_before(tmp_path):
    folder = begun(tmp_path / "out", "batch_size=3", "epochs=7", "max_length=99", "lr=0.25")
    found = as_before(config("max_length=50"), folder)
    assert (found.batch_size, found.epochs, found.max_length) == (3, 7, 50)  # which is given
    assert found.lr == config().lr
    assert as_before(config("lr=auto"), folder).lr == 0.25
    alone = config()
    assert as_before(alone, tmp_path / "nothing") is alone


def adapter(*texts) -> Any:
    terms = [Term(parse(text), {}) for text in texts]
    return Contents({f"l{i}": LayerUpdate((4, 4), (term,)) for i, term in enumerate(terms)})


def test_the_method_is_the_adapters():
    found = with_its_method(config("adapter=a"), adapter("head", "lora:rank=3", "lora:rank=3"))
    assert found.parsed_method() == LoRA(rank=3)
    same = with_its_method(config("adapter=a", "method=lora:rank=3"), adapter("lora:rank=3"))
    assert same.parsed_method() == LoRA(rank=3)
    with pytest.raises(SpectuneError) as refused:
        with_its_method(config("adapter=a", "method=svf"), adapter("lora:rank=3"))
    assert str(refused.value) == (
        "method svf is given, and the adapter in a is lora:rank=3; leave method out to go on from it"
    )


def test_an_adapter_of_heads_alone_says_no_method():
    for one in (adapter("head"), Contents({})):
        with pytest.raises(SpectuneError, match="the adapter in a has no layer with a method to go on with"):
            with_its_method(config("adapter=a"), one)


def test_the_newest_checkpoint_that_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "spectune.training.resuming.checkpoints", lambda output, console: sorted(output.glob("checkpoint-*"))
    )
    with pytest.raises(SpectuneError, match=r"there is no checkpoint in .* to resume from; run without resume=true"):
        last_checkpoint(tmp_path, Console(quiet=True))
    for name in ("checkpoint-5", "checkpoint-7", ".checkpoint-9.partial"):
        (tmp_path / name).mkdir()
    found = last_checkpoint(tmp_path, Console(quiet=True))
    assert (found.name, step_of(found)) == ("checkpoint-7", 7)
    assert not (tmp_path / ".checkpoint-9.partial").exists()


def test_a_run_that_is_the_same_says_nothing(tmp_path):
    folder = begun(tmp_path / "out", "lr=0.1")
    assert told(config("lr=0.1"), folder, RECORDS) == ""


def test_what_may_change_is_told(tmp_path):
    folder = begun(tmp_path / "out", "lr=0.1")
    assert told(config("lr=0.2"), folder, RECORDS).startswith("resuming with changed lr")


def test_another_number_of_processes_is_the_same_up_to_rounding(tmp_path):
    folder = begun(tmp_path / "out", "batch_size=4")
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    said = told(config("batch_size=8"), folder, RECORDS)
    assert "processes" in said
    assert "the result is the same up to rounding, and to what dropout draws" in said


@pytest.mark.parametrize(
    ("pair", "name"), [("method=pissa", "method"), ("seed=5", "seed"), ("batch_size=99", "batch_size")]
)
def test_what_would_be_another_run_is_refused(tmp_path, pair, name):
    folder = begun(tmp_path / "out", "batch_size=4")
    with pytest.raises(SpectuneError, match=f"cannot resume .* with another .*{name}.*or start anew"):
        told(config("batch_size=4", pair) if name != "batch_size" else config(pair), folder, RECORDS)


def test_data_that_changed_is_refused(tmp_path):
    folder = begun(tmp_path / "out")
    assert told(config(), folder, [[*RECORDS[0], *RECORDS[1]]]) == ""  # the same records, however they are parted
    with pytest.raises(SpectuneError, match="the data changed since its run began; give the data as it was"):
        told(config(), folder, RECORDS[::-1])


def test_what_was_measured_before_the_first_step():
    def log(*history) -> Any:
        return SimpleNamespace(history=[*history])

    assert measured_before(log({"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.5, "epoch": 0})) == {
        "loss": 2.0, "accuracy": 0.5
    }  # fmt: skip
    assert measured_before(log({"step": 1, "eval_loss": 2.0})) == {}
    assert measured_before(log()) == {}

"""What may go wrong while a run writes: killed at any moment, a full disk, damaged files, missing packages."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectune
from spectune.cli import main
from spectune.errors import SpectuneError
from spectune.training import progress
from spectune.training.config import load_config
from spectune.training.run import train
from spectune.training.tasks.sft import Sft
from spectune.training.trainer import checkpoints as checkpoints_module
from spectune.training.trainer.checkpoint_files import checkpoints
from spectune.training.trainer.trainer import AdapterTrainer


@pytest.fixture
def settings(settings, tmp_path):
    return [*settings, f"output={tmp_path / 'out'}"]


def run(settings, *more):
    return train(load_config(None, [*settings, *more]))


class Killed(BaseException):
    """As after kill -9, nothing is tidied up."""


WRITES = ((os, "replace"), (os, "fsync"), (torch, "save"), (checkpoints_module, "save_tensors"), (Path, "write_bytes"))


def dying_at(number, patch):
    """Die at this call of something that writes, counted from 1, and return the calls so far."""
    calls = []

    def wrapped(original):
        def call(*args, **kwargs):
            calls.append(original)
            if len(calls) >= number:
                raise Killed
            return original(*args, **kwargs)

        return call

    def leave(path, *args, original=shutil.rmtree, **kwargs):
        return None if len(calls) >= number else original(path, *args, **kwargs)

    for owner, name in WRITES:
        patch.setattr(owner, name, wrapped(getattr(owner, name)))
    patch.setattr(checkpoints_module.shutil, "rmtree", leave)
    return calls


def test_killed_at_any_write_of_a_checkpoint_the_one_before_loads(settings, tmp_path, monkeypatch, capsys):
    trainers = []
    original = AdapterTrainer.__init__
    monkeypatch.setattr(
        AdapterTrainer, "__init__", lambda self, *a, **k: (trainers.append(self), original(self, *a, **k))[1]
    )
    run(settings, "max_steps=6")
    trainer, out = trainers[0], tmp_path / "out"
    shutil.rmtree(out / "checkpoint-6")
    before = {path.name: path.read_bytes() for path in (out / "checkpoint-5").iterdir()}
    trainer.state.global_step = 10
    for number in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            calls = dying_at(number, patch)
            try:
                trainer._save_checkpoint(None, None)
            except Killed:
                pass
            else:
                break
        whole = [path.name for path in checkpoints(out)]
        assert whole in (["checkpoint-5"], ["checkpoint-5", "checkpoint-10"])
        assert {path.name: path.read_bytes() for path in (out / "checkpoint-5").iterdir()} == before
        for path in checkpoints(out):
            trainer._load_from_checkpoint(str(path))
            trainer._load_optimizer_and_scheduler(str(path))
            spectune.Adapter.load(path)
    assert len(calls) > 15
    assert [path.name for path in checkpoints(out)] == ["checkpoint-5", "checkpoint-10"]


def test_overwriting_leaves_nothing_of_the_run_before(settings, tmp_path, monkeypatch):
    run(settings, "max_steps=1")
    (tmp_path / "out" / "outcomes").mkdir()
    monkeypatch.setattr(AdapterTrainer, "training_step", full)
    with pytest.raises(OSError, match="No space"):
        run(settings, "max_steps=1", "overwrite=true", "seed=1")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"config.yaml", "run.json", "README.md", "log.jsonl"}


def test_overwriting_keeps_the_adapter_that_the_run_goes_on_from(settings, tmp_path, monkeypatch):
    run(settings, "max_steps=1")
    monkeypatch.setattr(AdapterTrainer, "training_step", full)
    with pytest.raises(OSError, match="No space"):
        run(settings, "max_steps=1", "overwrite=true", f"adapter={tmp_path / 'out'}")
    spectune.Adapter.load(tmp_path / "out")


def test_a_loss_that_rises_is_told_once(settings, monkeypatch, capsys):
    original = AdapterTrainer.log

    def log(self, logs, *args, **kwargs):
        original(self, logs | ({"loss": 2.0**self.state.global_step} if "loss" in logs else {}), *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "log", log)
    run(settings, "max_steps=12")
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("the training loss rose from 2.000 to ") == 1
    assert "to 6.892" in told  # smoothed


def test_an_unfinished_run_is_not_overwritten_unasked(settings, tmp_path):
    run(settings, "max_steps=5")
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(SpectuneError, match="holds an unfinished run: go on with resume=true"):
        run(settings, "max_steps=3")
    run(settings, "max_steps=3", "overwrite=true")
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence_that_names_what_is_kept(settings, tmp_path, monkeypatch):
    out, original = tmp_path / "out", torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda x, path: full() if "checkpoint" in str(path) else original(x, path))
        with pytest.raises(SpectuneError, match=r"-5 cannot be .*; no checkpoint yet; free .* and run it again"):
            run(settings, "max_steps=10")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda x, path: full() if "checkpoint-10" in str(path) else original(x, path))
        with pytest.raises(SpectuneError, match=r"-10 cannot be written \(No space left on device\).*-5; free"):
            run(settings, "max_steps=10")
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-5"}
    with monkeypatch.context() as patch:
        patch.setattr("spectune.training.run.plot_curve", full)
        with pytest.raises(SpectuneError, match=r"out cannot be written \(No space left.*-10; free some space"):
            run(settings, "max_steps=10", "resume=true")
    assert run(settings, "max_steps=10", "resume=true").steps == 10


def test_an_adapter_that_is_not_finite_is_not_saved(settings, tmp_path, monkeypatch):
    original = AdapterTrainer._clip_grad_norm

    def explode(self, model):
        if self.state.global_step == 4:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return original(self, model)

    monkeypatch.setattr(AdapterTrainer, "_clip_grad_norm", explode)
    with pytest.raises(SpectuneError, match=r"the adapter became nan at step 5: .*no checkpoint yet"):
        run(settings, "max_steps=10")
    assert checkpoints(tmp_path / "out") == []


def test_the_command_says_how_to_go_on_after_an_interrupt(settings, monkeypatch, capsys):
    original = AdapterTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", interrupt)
    monkeypatch.setattr(sys, "argv", ["spectune", "train", *settings, "max_steps=9"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    told = "".join(capsys.readouterr().err.split())
    assert "interruptedatstep3;saved" in told
    assert "goonwithresume=true" in told


def test_memory_is_in_the_log(settings):
    lines = run(settings, "max_steps=2").history
    assert all(line["peak_memory"] > 1e7 for line in lines if "loss" in line)


def test_tensorboard_gets_the_losses(settings, tmp_path):
    pytest.importorskip("tensorboardX")
    run(settings, "max_steps=2", "held_out=0", "report_to=tensorboard")
    events = [path.read_bytes() for path in (tmp_path / "out").rglob("events.out.tfevents*")]
    assert any(b"train/loss" in content for content in events)


def test_what_cannot_be_reported_to_is_told_before_anything_is_done(settings, tmp_path, monkeypatch):
    with pytest.raises(SpectuneError, match="report_to=tensorbord is not known; did you mean 'tensorboard'"):
        run(settings, "report_to=tensorbord")

    class Missing:
        def __init__(self):
            raise RuntimeError("TrackioCallback requires trackio to be installed.")

    monkeypatch.setitem(progress.INTEGRATION_TO_CALLBACK, "trackio", Missing)
    monkeypatch.setattr(Sft, "read", lambda self: pytest.fail("the data was read"))
    monkeypatch.setattr(Sft, "load", lambda self, *records: pytest.fail("the model was loaded"))
    with pytest.raises(SpectuneError, match=r"report_to=trackio needs a package .*: pip install trackio$"):
        run(settings, "report_to=[trackio]")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_kill_and_a_real_limit(settings, tmp_path):
    """kill -9 as checkpoint-10 gets its name, and a file that may not grow."""
    kill = (
        "import os, signal, sys; original = os.replace\n"
        "def replace(a, b):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if str(b).endswith('checkpoint-10') else original(a, b)\n"
        "os.replace = replace; from spectune.cli import main; main()"
    )
    command = [sys.executable, "-c", kill, "train", *settings, "max_steps=10"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-5"]
    assert run(settings, "max_steps=10", "resume=true").steps == 10
    limited = " ".join(
        ["ulimit -f 4;", sys.executable, "-m spectune train", *settings, "max_steps=5", "overwrite=true"]
    )
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr

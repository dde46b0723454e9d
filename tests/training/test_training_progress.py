"""What a run tells and saves as it goes on, is interrupted, or has no patience any more."""

import signal

import pytest

from spectune.training.progress import Interrupted
from spectune.training.trainer import trainer as trainer_module
from training.test_run import run


def test_an_interrupt_saves_and_says_how_to_go_on(settings, tmp_path, monkeypatch):
    original = trainer_module.AdapterTrainer.training_step

    def interrupt_once(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "training_step", interrupt_once)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"at step 3; saved .*checkpoint-3, go on with resume=true"):
        run(settings, f"output={tmp_path / 'out'}", "max_steps=10")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert run(settings, f"output={tmp_path / 'out'}", "max_steps=10", "resume=true").steps == 10


def test_an_interrupt_names_what_it_saved_and_not_the_best_checkpoint(settings, tmp_path, monkeypatch):
    original = trainer_module.AdapterTrainer.training_step

    def interrupt_once(self, *args, **kwargs):
        if self.state.global_step == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "training_step", interrupt_once)
    with pytest.raises(Interrupted, match=r"at step 8; saved .*checkpoint-8, go on with resume=true"):
        run(settings, f"output={tmp_path / 'out'}", "max_steps=10", "best=true", "eval_steps=5")

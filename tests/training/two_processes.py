"""What the tests run under torchrun, asserted in each process: two_processes.py SCENARIO FOLDER KEY=VALUE ..."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.training import processes
from spectune.training.config import load_config
from spectune.training.progress import Interrupted
from spectune.training.run import train
from spectune.training.trainer import checkpoint_files, checkpoints
from spectune.training.trainer.trainer import AdapterTrainer
from training.setbacks import forgetting

# so few problems are held out that one process has none
REINFORCE = ["task=reinforce", "reward=training.two_processes:length", "samples=2", "max_new_tokens=4", "max_steps=1"]


def length(completions):
    """Reward words."""
    return [float(len(completion.split())) for completion in completions]


def run(settings, *more):
    return train(load_config(None, [*settings, *more]))


def tensors(result):
    return {
        (name, key): value
        for name, layer in result.adapter.layers.items()
        for key, value in layer.terms[0].trained.items()
    }


def at_step(step, patch, action):
    """Do something before the forward pass of a step."""
    original = AdapterTrainer.training_step

    def acting(self, *args, **kwargs):
        if self.state.global_step == step:
            action(self)
        return original(self, *args, **kwargs)

    patch.setattr(AdapterTrainer, "training_step", acting)


def interrupted(folder, settings):
    """A signal to one process stops and saves all; the resumed run is the whole one bit for bit, dropout included."""
    settings = [*settings, "method=dora:inner=lora,rank=2,dropout=0.3", "max_steps=7", "save_steps=3"]
    whole = run(settings, f"output={folder / 'whole'}")
    part = f"output={folder / 'part'}"
    with pytest.MonkeyPatch.context() as patch:
        if processes.rank() == 1:
            at_step(5, patch, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match=r"at step 6; saved .*checkpoint-6, go on with resume=true"):
            run(settings, part)
    resumed = run(settings, part, "resume=true")
    assert resumed.steps == 7
    assert resumed.before == whole.before
    ours, theirs = tensors(resumed), tensors(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [line["step"] for line in resumed.history] == [line["step"] for line in whole.history]
    own = torch.rand(1).item()  # what a process drops is its own affair
    assert len(set(processes.gather(own))) == 2


def not_finite(folder, settings):
    """A loss that is not finite in one process, in an accumulated batch, stops all, and nothing is saved after it."""
    output = folder / "nan"

    def poison(trainer):
        trainer.task.sums = lambda model, inputs, sums=trainer.task.sums: {
            key: value * float("nan") if key == "loss" else value for key, value in sums(model, inputs).items()
        }

    with pytest.MonkeyPatch.context() as patch:
        if processes.rank() == 1:
            at_step(3, patch, poison)
        with pytest.raises(SpectuneError, match=r"loss became nan at step 4: .*checkpoint-2"):
            run(
                settings,
                f"output={output}",
                "gradient_accumulation_steps=2",
                "batch_size=2",
                "save_steps=2",
                "log_steps=100",
            )
    assert [path.name for path in checkpoint_files.checkpoints(output)] == ["checkpoint-2"]


def best(folder, settings):
    """Every process ends with the best checkpoint, sharded or not."""
    more = ["eval_steps=2", "save_steps=2", "best=true", "schedule=constant"]
    for sharding in ("false", "true"):
        output = folder / f"best-{sharding}"
        with pytest.MonkeyPatch.context() as patch:
            forgetting(patch, after=4)
            result = run([*settings, *more], f"output={output}", f"fsdp={sharding}")
        losses = [line["eval_loss"] for line in result.history if "eval_loss" in line][1:-1]
        assert min(losses) < 0.99 * losses[-1]
        assert result.loss_after == pytest.approx(min(losses), rel=1e-5)
        step = 2 * (losses.index(min(losses)) + 1)
        ours, saved = tensors(result), Adapter.load(output / f"checkpoint-{step}")
        for (name, key), tensor in ours.items():
            torch.testing.assert_close(saved.layers[name].terms[0].trained[key], tensor, atol=1e-6, rtol=1e-5)


def full_disk(folder, settings):
    """What the main process cannot write ends all with one sentence."""
    output = folder / "full"

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        at_step(3, patch, lambda trainer: patch.setattr(checkpoints, "save_tensors", fail))
        with pytest.raises(
            SpectuneError, match=r"checkpoint-4 cannot be written \(No space left.*is .*checkpoint-2; free"
        ):
            run(settings, f"output={output}", "save_steps=2")
    processes.gather(None)
    assert not list(output.glob(".*partial"))


def other_process_fails(folder, settings):
    """An error in one process is an error of all, and nobody waits."""
    with pytest.raises((SpectuneError, ZeroDivisionError), match=r"process 1 failed: division by zero|^division"), \
            processes.together():  # fmt: skip
        1 / (1 - processes.rank())
    either = r"device=cuda:1 (is for one process; with 2 give device=cuda|cannot be used here)"
    with pytest.raises(SpectuneError, match=either):
        processes.start("cuda:1")


def tasks(folder, settings):
    """The tasks that have losses of their own; the test compares their logs with those of one process."""
    for name in ("classify", "dpo"):
        run(settings, f"task={name}", f"data={folder / f'{name}.jsonl'}", f"output={folder / f'two-{name}'}")
    run(settings, *REINFORCE, f"output={folder / 'two-reinforce'}")


def sharded(folder, settings):
    """FSDP2 gives the adapter of DDP, and either goes on from the other's checkpoint."""
    for number, method in enumerate(["svf", "dora:inner=pissa,rank=4", "adalora:rank=2,interval=1"]):
        more = [*settings, f"method={method}", "max_steps=6", "save_steps=3"]
        plain = run(more, f"output={folder / f'plain-{number}'}")
        output = f"output={folder / f'sharded-{number}'}"
        result = run(more, output, "fsdp=true")
        assert result.loss_after == pytest.approx(plain.loss_after, abs=1e-5)
        ours, theirs = tensors(result), tensors(plain)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-4)
        if processes.is_main():
            for path in (folder / f"sharded-{number}").glob("checkpoint-6"):
                path.rename(folder / f"removed-{number}")
        processes.gather(None)
        for sharding in ("true", "false"):
            resumed = tensors(run(more, output, "resume=true", f"fsdp={sharding}"))
            for key in theirs:
                same = {"atol": 0, "rtol": 0} if sharding == "true" else {"atol": 1e-6, "rtol": 1e-5}
                torch.testing.assert_close(resumed[key], ours[key], **same)


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.start("cpu")
    place = Path(sys.argv[2])
    for scenario in sys.argv[1].split(","):
        globals()[scenario](place, sys.argv[3:])
    (place / f"done-{processes.rank()}").touch()
    processes.finish()

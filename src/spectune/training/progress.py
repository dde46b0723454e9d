"""What a run shows and writes as it goes: a progress bar and a line of JSON for each step."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from spectune.errors import SpectuneError, nearest
from spectune.progress import Bar
from spectune.reading import RECORD_BYTES
from spectune.storage import open_itself, telling_of_full_disks, write_atomically
from spectune.training import processes
from spectune.training.curve import spoken
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainerControl, TrainerState, TrainingArguments

_RISE, _SMOOTHED = 3, 10  # times what the loss was at first, and lines of the log that it is smoothed over
_PACE = ("_runtime", "_per_second", "_time")


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and saved; the message says how to go on."""


class RunLog(TrainerCallback):
    """Show the loss or another measure, tokens/s, memory and time left, and append each logged step to log.jsonl.

    With several processes the main one writes and shows; tokens are those of all, and memory is that of the largest.

    Args:
        folder: where log.jsonl goes.
        console: where the bar goes.
        step: go on with the log that is there, up to this step; None begins anew.
    """

    def __init__(self, folder: Path, console: Console, step: int | None = None) -> None:
        self._path = folder / "log.jsonl"
        self._console = console
        self._trainer: AdapterTrainer | None = None
        self._curve = "loss"
        self._progress: Progress | None = None
        self._lines: Bar | None = None  # where there is no terminal
        self._evaluating: Bar | None = None  # outside of training, whose own bar is there
        self._held = 0
        self.history = _lines(self._path, step) if step is not None else []
        if processes.is_main():
            text = "".join(json.dumps(line) + "\n" for line in self.history)
            write_atomically(self._path, lambda path: path.write_text(text, encoding="utf-8"))
        self.interrupted = False  # as all processes agree at the end of a step
        self._signalled = False
        self._first: float | None = None  # the loss, at first and smoothed
        self._smooth = 0.0
        self._warned = False
        self.tokens_per_second = 0.0
        self._memory = 0
        self._handlers: dict[int, Any] = {}

    def watch(self, trainer: AdapterTrainer) -> None:
        """Take token counts, and the measure to show, from this trainer."""
        self._trainer, self._curve = trainer, trainer.task.curve

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        rises = args.get_warmup_steps(state.max_steps)
        if 0 < state.max_steps <= rises:
            self._console.print(
                f"all {state.max_steps} steps are warm-up, so that the learning rate is never reached: give warmup=0, "
                "or more steps",
                style="yellow",
            )
        self._start = time.perf_counter()
        self._stop_at_the_end_of_a_step()
        if not self._console.is_terminal:
            self._lines = Bar(self._console, "training", state.max_steps, state.global_step)
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{self._curve} {{task.fields[value]}}"),
            TextColumn("{task.fields[measures]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[memory]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, value="-", measures="", speed="-", memory=""
        )
        self._progress.start()

    def _stop_at_the_end_of_a_step(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: object) -> None:
        """Let the step end and save; a second signal stops at once."""
        self._signalled = True
        signal.signal(number, self._handlers.pop(number))
        self._console.print("stopping after this step", style="yellow")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if processes.total(self._signalled)[0]:
            self.interrupted = True
            control.should_save = control.should_training_stop = True
        self._memory = max(self._memory, memory())
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)
        if self._lines is not None:
            self._lines(state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader[object] | None = None,
        **kwargs: object,
    ) -> None:
        """Show how far an evaluation is, before and after training."""
        if self._progress is not None or self._lines is not None or self._console.quiet:
            return
        if self._evaluating is None:
            total = None if eval_dataloader is None else len(eval_dataloader)
            self._evaluating, self._held = Bar(self._console, "evaluating", total).__enter__(), 0
        self._held += 1
        self._evaluating(self._held)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Say what an evaluation in the midst of training found."""
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None
        if (self._progress is not None or self._lines is not None) and self._trainer is not None:
            names = dict.fromkeys(("loss", *self._trainer.task.shown))
            found = [f"{spoken(n)} {metrics[f'eval_{n}']:.3f}" for n in names if f"eval_{n}" in metrics]
            if found:
                self._console.print(f"step {state.global_step}, held out: {', '.join(found)}", highlight=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        line = {"step": state.global_step, **{k: float(v) for k, v in (logs or {}).items() if is_measure(k)}}
        if len(line) == 1:
            return
        if (self._progress is not None or self._lines is not None) and self._trainer is not None:
            seconds = time.perf_counter() - self._start
            self.tokens_per_second = self._trainer.total_tokens() / max(1e-9, seconds)
            most = max(processes.gather(max(self._memory, memory())))
            line |= {
                "tokens_per_second": round(self.tokens_per_second, 1),
                "seconds": round(seconds, 3),
                "peak_memory": most,
            }
            shown: dict[str, Any] = {"speed": f"{self.tokens_per_second:.0f}", "memory": f"{most / 1e9:.1f} GB"}
            if self._curve in line:
                shown["value"] = f"{line[self._curve]:.3f}"
            measured = [name for name in self._trainer.task.shown if f"eval_{name}" in line]
            if measured:
                shown["measures"] = ", ".join(f"{spoken(name)} {line[f'eval_{name}']:.3f}" for name in measured)
            if self._progress is not None:
                self._progress.update(self._task, **shown)
            if self._lines is not None:
                at = f"{self._curve} {shown['value']}, " if "value" in shown else ""
                self._lines(said=f"{at}{shown['speed']} tokens/s, {shown['memory']}")
        if self._curve == "loss" and "loss" in line:
            self._watch_loss(line["loss"])
        self.history.append(line)
        with processes.together():
            if processes.is_main():
                kept = self._trainer.with_more_space() if self._trainer is not None else "free some space"
                with telling_of_full_disks(self._path, kept), open_itself(self._path, "ab") as file:
                    file.write(json.dumps(line).encode() + b"\n")

    def _watch_loss(self, loss: float) -> None:
        """Warn once where the loss goes up and up; one that is not finite is the trainer's to see."""
        if self._first is None:
            self._first = self._smooth = loss
        self._smooth += (loss - self._smooth) / _SMOOTHED
        if self._smooth > _RISE * max(self._first, 0.1) and not self._warned:
            self._warned = True
            self._console.print(
                f"the training loss rose from {self._first:.3f} to {self._smooth:.3f}: lower the learning rate",
                style="yellow",
                highlight=False,
            )

    def close(self) -> None:
        """Take the bar away, also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._lines is not None:
            self._lines.say()
            self._lines = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()


def check_reports(names: Sequence[str]) -> None:
    """Raise unless everything that a run is to report to is known to transformers, and installed.

    Raises:
        SpectuneError: it is not; the nearest name, or what to install, is named.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise SpectuneError(f"report_to={name} is not known{nearest(name, INTEGRATION_TO_CALLBACK)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError):
            package = name.replace("_", "-")
            raise SpectuneError(
                f"report_to={name} needs a package that is not installed: pip install {package}"
            ) from None


def memory() -> int:
    """Return the bytes that this process takes: at most so far on a CUDA device, now in main memory without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of a log up to a step; one that was cut off ends it."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    with path.open("rb") as file:
        for text in iter(lambda: file.readline(RECORD_BYTES), b""):
            try:
                line = json.loads(text.decode(errors="replace"))
                if line["step"] <= step:
                    lines.append(line)
            except (ValueError, RecursionError, KeyError, TypeError):
                break
    return lines


def is_measure(key: str) -> bool:
    """Whether a logged value is of the model, not of the run's pace or length."""
    return key not in ("epoch", "total_flos") and not key.startswith("train_") and not key.endswith(_PACE)

"""What a run shows and writes as it goes: a progress bar and a line of JSON for each step."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

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

from spectune.training.curve import spoken
from spectune.training.trainer import AdapterTrainer

_PACE = ("_runtime", "_per_second", "_time")


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and saved; the message says how to go on."""


class RunLog(TrainerCallback):
    """Show loss, tokens/s and time left, and append each logged step to log.jsonl.

    Args:
        folder: where log.jsonl goes.
        console: where the bar goes.
        keep: go on with the log that is there.
    """

    def __init__(self, folder: Path, console: Console, keep: bool = False) -> None:
        self._path = folder / "log.jsonl"
        if not keep:
            self._path.unlink(missing_ok=True)
        self._console = console
        self._trainer: AdapterTrainer | None = None
        self._progress: Progress | None = None
        self.history: list[dict[str, Any]] = []
        self.interrupted = False
        self._handler: Any = None

    def watch(self, trainer: AdapterTrainer) -> None:
        """Take token counts from this trainer."""
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[measures]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, loss="-", measures="", speed="-"
        )
        self._progress.start()
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        """Let the step end and save; a second Ctrl-C stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, self._handler)
        self._console.print("stopping after this step", style="yellow")

    def tokens_per_second(self) -> float:
        """Return the mean since training began."""
        tokens = self._trainer.tokens if self._trainer else 0
        return tokens / max(1e-9, time.perf_counter() - self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, speed=f"{self.tokens_per_second():.0f}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = {"step": state.global_step, **{k: float(v) for k, v in (logs or {}).items() if is_measure(k)}}
        if len(line) == 1:
            return
        if self._progress is not None:
            line |= {
                "tokens_per_second": round(self.tokens_per_second(), 1),
                "seconds": round(time.perf_counter() - self._start, 3),
            }
            if "loss" in line:
                self._progress.update(self._task, loss=f"{line['loss']:.3f}")
            shown = [name for name in (self._trainer.task.shown if self._trainer else ()) if f"eval_{name}" in line]
            if shown:
                measures = ", ".join(f"{spoken(name)} {line[f'eval_{name}']:.3f}" for name in shown)
                self._progress.update(self._task, measures=measures)
        self.history.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Take the bar away, also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()


def is_measure(key: str) -> bool:
    """Whether a logged value is of the model, not of the run's pace or length."""
    return key not in ("epoch", "total_flos") and not key.startswith("train_") and not key.endswith(_PACE)

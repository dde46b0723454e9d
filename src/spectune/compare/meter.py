"""What a run takes: the peak of its memory, the time of its steps, and the floor under them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor
from transformers import TrainerCallback

from spectune.speed.heap import release_memory
from spectune.training.trainer.trainer import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

_RESET = Path("/proc/self/clear_refs")  # "5" there sets the peak back to what is resident now
_STATUS = Path("/proc/self/status")


class Peak:
    """The most memory that this process, or its CUDA device, has taken since this was made, above what it had then."""

    def __init__(self) -> None:
        gc.collect()  # a trainer holds itself, and the trial before must not give back within this one
        release_memory()
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        self._before = psutil.Process().memory_info().rss
        self._known = False
        with suppress(OSError):
            _RESET.write_text("5", encoding="ascii")
            self._known = True

    def bytes(self) -> int | None:
        """Return it; None where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._before
        if not self._known:
            return None
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return max(0, int(line.split()[1]) * 1024 - self._before)


class StepTimes(TrainerCallback):
    """The seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        _wait(args.device)
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        _wait(args.device)
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float | None:
        """Return the middle one, leaving the first out where there are several."""
        return median(self.seconds[1:] or self.seconds) if self.seconds else None


def floor(model: PreTrainedModel, task: Objective, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the seconds of the frozen model's forward pass and its input's gradient, the median over batches.

    Args:
        model: without adapters.
        task: whose loss it is.
        batches: of its examples; the first warms up.
    """
    model.enable_input_require_grads()
    model.train()
    seconds = []
    try:
        for batch in batches:
            start = time.perf_counter()
            inputs = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
            task.sums(model, inputs)["loss"].backward()
            _wait(model.device)
            seconds.append(time.perf_counter() - start)
    finally:
        model.disable_input_require_grads()
    return median(seconds[1:] or seconds)


def _wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

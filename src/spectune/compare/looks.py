"""What a run shows on its way: its measures of validation data at equal distances, by which it may be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from spectune.compare.race import Look

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_FALLS = 0.01  # of what a loss has fallen so far: by less, it has stopped

Report = Callable[[Sequence[Look]], bool]  # all looks so far -> whether to stop


def levelled(losses: Sequence[float], window: int) -> bool:
    """Return whether a held-out loss has stopped falling: over a window by less than 1% of all it has fallen.

    Never within the first window, nor before it has come 1% below where it started.

    Args:
        losses: at equal distances, the first before any step.
        window: of so many distances.
    """
    fallen = losses[0] - min(losses)
    if len(losses) <= window + 1 or not fallen > _FALLS * losses[0]:
        return False
    return losses[-1 - window] - losses[-1] < _FALLS * fallen


class Looks(TrainerCallback):
    """Keep the looks at the validation data, and stop the run where it is to stop.

    Args:
        key: the measure that looks are by.
        sign: -1 where less of it is better.
        right: takes what was answered since the last look: for each record whether that was right, or None.
        report: told of every look after the first; True drops the run.
        window: looks over which the loss has to fall, or the run ends; None to go on to the last step.
    """

    def __init__(
        self, key: str, sign: int, right: Callable[[], list[int] | None], report: Report, window: int | None = None
    ) -> None:
        self._key, self._sign, self._right, self._report, self._window = key, sign, right, report, window
        self.dropped = False
        self.looks: list[Look] = []
        self.history: list[dict[str, float]] = []

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if metrics is None or not all(key.startswith("eval_") for key in metrics if key != "epoch"):
            return
        self.history.append({"step": state.global_step, **metrics})
        self.looks.append(Look(state.global_step, self._sign * metrics[f"eval_{self._key}"], self._right()))
        if not 0 < state.global_step < state.max_steps:
            return
        losses = [line["eval_loss"] for line in self.history]
        self.dropped = self._report(self.looks)
        if self.dropped or (self._window is not None and levelled(losses, self._window)):
            control.should_training_stop = True

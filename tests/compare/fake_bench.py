"""A bench on which nothing trains: what a run comes to is a function of its method, rate and seed."""

import math
from collections.abc import Callable
from typing import Any

from spectune.compare.race import Look
from spectune.compare.trial import Trial

RECORDS, STEPS = 40, 8


def good_at(best: float) -> Callable[[Trial], float]:
    """Return an accuracy that is highest at one learning rate, and falls by a tenth for a factor of three."""
    return lambda trial: 0.5 if trial.lr is None else 0.9 - 0.1 * abs(math.log10(trial.lr / best)) * 2


class FakeBench:
    """What `Study` and `work` need of a bench.

    Args:
        accuracy: of a trial.
        step: seconds that a step of a trial takes.
    """

    steps = STEPS

    def __init__(self, accuracy: Callable[[Trial], float], step: Callable[[Trial], float] = lambda trial: 0.1) -> None:
        self.accuracy, self.step, self.ran = accuracy, step, list[Trial]()

    def run(self, trial: Trial, report: Callable[[Any], bool] = lambda looks: False) -> dict[str, Any]:
        """Return a result as `Bench.run` does."""
        self.ran.append(trial)
        end, steps = self.accuracy(trial), trial.steps or self.steps
        looks, pruned = [], False
        for i in range(5):
            right = _right(0.2 + (end - 0.2) * (1 - (1 - i / 4) ** 2), trial.seed)
            looks.append(Look(steps * i // 4, sum(right) / RECORDS, right))
            if 0 < i < 4 and report(looks):
                pruned = True
                break
        right = _right(end, trial.seed)
        history = [{"step": look.step, "eval_loss": 1 - look.value, "eval_accuracy": look.value} for look in looks]
        measures = {"accuracy": sum(right) / RECORDS, "loss": 1 - end, "macro_f1": end}
        return {
            "steps": looks[-1].step, "whole": self.steps, "records": RECORDS, "trainable_parameters": 10,
            "train_seconds": 1.0, "step_seconds": self.step(trial), "floor_seconds": None, "tokens_per_second": 1.0,
            "history": history,
            "looks": [{**look._asdict(), "right": "".join(map(str, look.right))} for look in looks],
            "validation": measures, "pruned": pruned, "test": measures, "train": measures, "right": right,
            "general": None, "adapter_bytes": 1, "setup_seconds": 0.1, "peak_bytes": None, "seconds": 1.0,
            "error": None,
        }  # fmt: skip


def _right(share: float, seed: int) -> list[int]:
    """Return answers of which a share is right, other ones with another seed."""
    ones = round(share * RECORDS)
    return [int((i + seed) % RECORDS < ones) for i in range(RECORDS)]

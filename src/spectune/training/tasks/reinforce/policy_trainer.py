"""The trainer of `task: reinforce`: rewards in the log, and their failures told with what is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from spectune.errors import SpectuneError
from spectune.storage import telling_of_full_disks, write_atomically
from spectune.training import processes
from spectune.training.tasks.reinforce.rewards import RewardError
from spectune.training.trainer.sampling import BLANK
from spectune.training.trainer.trainer import AdapterTrainer, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SILENT = 10  # batches without a reward that differs before a warning


class Rewarded(Objective, Protocol):
    """A task whose evaluations note what became of each problem."""

    outcomes: list[dict[str, object]]


class PolicyTrainer(AdapterTrainer):
    """An AdapterTrainer that logs reward, KL and completion length, and warns where rewards say nothing."""

    task: Rewarded

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since_log: dict[str, Tensor] = {}
        self._silent = 0

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch of rollouts, as AdapterTrainer does.

        Raises:
            SpectuneError: a reward failed; the last checkpoint is named and kept.
        """
        try:
            found = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss, sums = cast("tuple[Tensor, dict[str, Tensor]]", found)
        except RewardError as error:
            raise SpectuneError(f"{error} (at step {self.state.global_step + 1}; {self.kept()})") from error
        if model.training:
            for key, value in sums.items():
                self._since_log[key] = self._since_log.get(key, 0) + value.detach()
            self._listen(int(sums["signal"]))
        return (loss, sums) if return_outputs else loss

    def _sums(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = len(self.task.outcomes)
        sums = super()._sums(model, inputs)
        if inputs.get(BLANK):  # what came of the stand-in is of no problem that was held out
            del self.task.outcomes[known:]
        return sums

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Add the means over the completions since the last line."""
        if "loss" in logs and self._since_log:
            sums: dict[str, Any] = {key: self.accelerator.reduce(value) for key, value in self._since_log.items()}
            logs |= self.task.metrics(sums)
            self._since_log = {}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with greedy completions, and write what became of each problem to outcomes/step-N.jsonl.

        Raises:
            SpectuneError: that cannot be written; the last checkpoint is named and kept.
        """
        self.task.outcomes.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        (output.metrics or {}).pop(f"{metric_key_prefix}_loss", None)
        lines = "".join(json.dumps(outcome) + "\n" for outcome in gather_object(self.task.outcomes))
        file = Path(self.args.output_dir or ".") / "outcomes" / f"step-{self.state.global_step}.jsonl"
        with processes.together():
            if processes.is_main():
                with telling_of_full_disks(file, self.with_more_space()):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, lambda path: path.write_text(lines, encoding="utf-8"))
        return output

    def _listen(self, signal: int) -> None:
        self._silent = 0 if signal else self._silent + 1
        if self._silent == _SILENT:
            warnings.warn(
                f"in {_SILENT} batches no prompt had completions of different rewards, so that there is nothing to "
                "learn from: start from an adapter that solves some of the problems, take easier ones or more samples, "
                "or give a reward with parts",
                stacklevel=2,
            )
            self._silent = -(10**9)  # once

"""The trainer: transformers.Trainer, with a task's loss and measures and checkpoints of the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from spectune.errors import SpectuneError, nearest
from spectune.training.checkpoints import AdapterCheckpoints

if TYPE_CHECKING:
    from spectune.training.tasks import Task


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """Train the adapter on a model by a task's loss; checkpoints hold it and not the base.

    Args:
        task: whose examples, batches, loss and measures these are.
        adapter_name: the adapter.
        group_lr: learning rates of trained tensors by their name in the method, such as "magnitude" or "z".
        args, kwargs: as for transformers.Trainer.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        task: Task,
        adapter_name: str = "default",
        group_lr: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.task = task
        self.adapter_name = adapter_name
        self.group_lr = dict(group_lr or {})
        self.model_accepts_loss_kwargs = True  # so that the items of a step are counted
        self._loss_shifts_labels = False
        self.tokens = 0
        self._evaluated: dict[str, Tensor] = {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return AdamW, with a group of its own for each tensor name that has its own learning rate.

        Raises:
            SpectuneError: no trained tensor has such a name.
        """
        if not self.group_lr or self.optimizer is not None:
            return super().create_optimizer(model)
        stepped: Any = model if model is not None else self.model
        trained = {n: p for n, p in stepped.named_parameters() if p.requires_grad}
        tails = {n: n.rpartition(".")[2] for n in trained}
        for name in self.group_lr:
            if name not in tails.values():
                raise SpectuneError(f"group_lr: no trained tensor is named {name!r}{nearest(name, tails.values())}")
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in trained.items():
            groups.setdefault(self.group_lr.get(tails[name], self.args.learning_rate), []).append(parameter)  # type: ignore[arg-type]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        options |= {"weight_decay": self.args.weight_decay}
        self.optimizer = kind([{"params": p, "lr": lr} for lr, p in groups.items()], **options)
        return self.optimizer  # type: ignore[return-value]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the task's losses over the items of the batch, divided by those of the whole step.

        Raises:
            SpectuneError: the loss is not finite; the last checkpoint is named and kept.
        """
        sums = self.task.sums(model, dict(inputs))
        loss = sums["loss"] / (num_items_in_batch if num_items_in_batch is not None else sums["items"])
        if not torch.isfinite(loss):
            raise SpectuneError(self._not_finite(float(loss.detach())))
        if model.training:
            self.tokens += _token_count(inputs)
        return (loss, sums) if return_outputs else loss

    def _not_finite(self, loss: float) -> str:
        kept = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"
        return f"the loss became {loss} at step {self.state.global_step + 1}: lower the learning rate ({kept})"

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, and report the task's metrics of the sums over all batches."""
        self._evaluated = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = {key: self.accelerator.reduce(value) for key, value in self._evaluated.items()}
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self.task.metrics(sums).items()})  # type: ignore[union-attr]
        return output

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Add the sums of a batch up."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, sums = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        for key, value in sums.items():
            before = self._evaluated.get(key)
            self._evaluated[key] = value if before is None else before + value
        return loss, None, None


def _token_count(inputs: Any) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()

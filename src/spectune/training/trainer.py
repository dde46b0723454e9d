"""The trainer: transformers.Trainer, with the loss at supervised positions and checkpoints of the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from spectune.adapters.files import write_atomically
from spectune.errors import SpectuneError, nearest
from spectune.model import extract
from spectune.training.batches import IGNORE

STATE = "adapter_state.safetensors"


class AdapterTrainer(Trainer):
    """Train the adapter named `adapter_name` of a model; checkpoints hold it and not the base.

    Args:
        adapter_name: the adapter.
        group_lr: learning rates of trained tensors by their name in the method, such as "magnitude" or "z".
        args, kwargs: as for transformers.Trainer; batches come from `Packer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        adapter_name: str = "default",
        group_lr: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.adapter_name = adapter_name
        self.group_lr = dict(group_lr or {})
        self.model_accepts_loss_kwargs = True
        self.tokens = 0
        self.last_checkpoint: str | None = None

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
            groups.setdefault(self.group_lr.get(tails[name], self.args.learning_rate), []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        options |= {"weight_decay": self.args.weight_decay}
        self.optimizer = kind([{"params": p, "lr": lr} for lr, p in groups.items()], **options)
        return self.optimizer  # type: ignore[return-value]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean cross-entropy over the supervised tokens of the whole optimizer step.

        Raises:
            SpectuneError: the loss is not finite; the last checkpoint is named and kept.
        """
        inputs = {k: v for k, v in inputs.items() if k != "shift_labels"}
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits.float()
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORE).sum()
        loss = total / count
        if not torch.isfinite(loss):
            raise SpectuneError(self._not_finite(float(loss.detach())))
        if model.training:
            self.tokens += _token_count(inputs)
        return (loss, outputs) if return_outputs else loss

    def _not_finite(self, loss: float) -> str:
        kept = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"
        return f"the loss became {loss} at step {self.state.global_step + 1}: lower the learning rate ({kept})"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        extract(self.accelerator.unwrap_model(self.model), self.adapter_name).save(folder)
        if folder != Path(self.args.output_dir or "."):
            state = {k: v.contiguous() for k, v in adapter_state(self.model).items()}
            write_atomically(folder / STATE, lambda path: save_file(state, path))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.last_checkpoint = str(Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / STATE)
        target = adapter_state(model if model is not None else self.model)
        if state.keys() != target.keys():
            differing = min(state.keys() ^ target.keys())
            raise SpectuneError(
                f"{resume_from_checkpoint} was made with other settings (it differs in {differing!r}); "
                "resume with the configuration of the run"
            )
        with torch.no_grad():
            for key, tensor in state.items():
                target[key].copy_(tensor)


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return every tensor of the adapters in a model's state, schedules included, by name."""
    return {key: value for key, value in model.state_dict().items() if ".adapters." in f".{key}"}


def _token_count(inputs: Any) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()

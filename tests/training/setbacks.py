"""Runs whose best step is known beforehand, whatever the processor."""

from typing import Any

import pytest
import torch

from spectune.training.trainer.trainer import AdapterTrainer


def forgetting(patch: pytest.MonkeyPatch, after: int) -> None:
    """From a step on, have the adapter as it was at first, with nothing learned any more: the base answers."""
    original = AdapterTrainer.training_step
    first: dict[str, Any] = {}

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not first:
            first.update({name: p.detach().clone() for name, p in trained.items()})
        if self.state.global_step >= after:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(first[name])
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        return original(self, model, *args, **kwargs)

    patch.setattr(AdapterTrainer, "training_step", training_step)

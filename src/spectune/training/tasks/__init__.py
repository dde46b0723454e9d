"""Tasks of `spectune train`, one file each; `base.py` is the contract."""

from __future__ import annotations

from importlib import import_module

from spectune.training.config import TrainConfig
from spectune.training.tasks.base import Task

_HOMES = {"sft": "Sft", "classify": "Classify", "dpo": "Dpo", "reinforce": "Reinforce"}


def make_task(config: TrainConfig) -> Task:
    """Return the task of a configuration."""
    module = import_module(f"{__name__}.{config.task}")
    return getattr(module, _HOMES[config.task])(config)


__all__ = ["Task", "make_task"]

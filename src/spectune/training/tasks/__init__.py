"""Tasks of `spectune train`, one file or folder each; `base.py` is the contract."""

from __future__ import annotations

from importlib import import_module

from spectune.training.config import TrainConfig
from spectune.training.tasks.base import Task

_HOMES = {"sft": "sft:Sft", "classify": "classify:Classify", "dpo": "dpo:Dpo", "reinforce": "reinforce.task:Reinforce"}


def make_task(config: TrainConfig) -> Task:
    """Return the task of a configuration."""
    module, _, name = _HOMES[config.task].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)(config)


__all__ = ["Task", "make_task"]

"""Tasks of `spectune train`, one file or folder each; `base.py` is the contract."""

from __future__ import annotations

from spectune.training.config import TrainConfig
from spectune.training.registry import find_task
from spectune.training.tasks.base import Task


def make_task(config: TrainConfig) -> Task:
    """Return the task of a configuration."""
    return find_task(config.task)(config)


__all__ = ["Task", "make_task"]

"""What a shell completes: keys of a run with their values, methods, and models."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from spectune.bases.embedded import EMBEDDED
from spectune.training.config import TrainConfig
from spectune.training.registry import task_keys, task_names


def settings(incomplete: str) -> list[str]:
    """Return what `key` or `key=val` may become."""
    fields = {**TrainConfig.model_fields, **task_keys()}
    key, equals, begun = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in fields if name.startswith(key)]
    if key not in fields:
        return []
    return [f"{key}={value}" for value in _values(key, fields[key].annotation) if value.startswith(begun)]


def _values(key: str, kind: object) -> list[str]:
    if key == "method":
        return methods("")
    if key == "model":
        return models("")
    if key == "task":
        return task_names()
    if kind is bool:
        return ["true", "false"]
    found: list[str] = []
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            found += map(str, get_args(part))
    return found


def methods(incomplete: str) -> list[str]:
    """Return the names of methods."""
    from spectune.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Return the names of embedded models."""
    return [name for name in EMBEDDED if name.startswith(incomplete)]

"""What a plan takes from a run's folder."""

from __future__ import annotations

from pathlib import Path

from spectune.bases.runs import SETTINGS, named, settings_of
from spectune.errors import SpectuneError
from spectune.planning.memory import precision_of_run
from spectune.training.config import load_config

_UNKNOWN = ("layers_to_transform", "rank_pattern", "alpha_pattern", "split")  # to the planner


def settings_for(name: str) -> dict[str, object]:
    """Return arguments of `plan` for a model, for a run by its folder, or for the base of an adapter by its folder.

    A run gives its base, method, layers, batch, length and precision, also before it has ended.

    Raises:
        SpectuneError: a run of layers that a plan cannot be told of.
    """
    if settings_of(name) is None:
        return {"model": named(name).base}
    config = load_config(Path(name) / SETTINGS, [])
    given = [key for key in _UNKNOWN if getattr(config, key)]
    given += ["targets that map to methods"] if isinstance(config.targets, dict) else []
    if given:
        raise SpectuneError(f"{name} was trained with {given[0]}, which a plan knows nothing of: plan {config.model}")
    found: dict[str, object] = {"model": config.model, "methods": [config.method], "targets": config.targets}
    found |= {"exclude": config.exclude, "overrides": config.overrides, "batch_size": config.batch_size}
    found |= {"length": config.max_length, "gradient_checkpointing": config.gradient_checkpointing}
    precision = precision_of_run(config.quantize, config.dtype)
    return found if precision is None else {**found, "precisions": [precision]}

"""A run folder, or an adapter's, in the place of a model: its base, with the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import CONFIG, read_config
from spectune.errors import SpectuneError
from spectune.reading import read_yaml

SETTINGS = "config.yaml"  # of a run folder


class Named(NamedTuple):
    """What a name stands for.

    Args:
        base: the model.
        adapter: the folder of an adapter on it, or None.
        quantize: what the run packed the base into, where the name is a run's folder.
    """

    base: str
    adapter: str | None
    quantize: str | None = None


def settings_of(name: str) -> dict[str, object] | None:
    """Return the settings of a run where a name is its folder, ended or not, and None where it is anything else."""
    folder = Path(name)
    if (folder / "config.json").is_file() or not (folder / SETTINGS).is_file():
        return None
    settings = read_yaml(folder / SETTINGS)
    return settings if isinstance(settings, dict) and "model" in settings else None


def named(name: str) -> Named:
    """Return the base that a name stands for, and the adapter on it where the name is a run's or an adapter's folder.

    Raises:
        SpectuneError: the folder is of an adapter that does not say which base it belongs to, or of a run that has
            not ended.
    """
    folder, settings = Path(name), settings_of(name)
    is_adapter = (folder / CONFIG).is_file()
    if (folder / "config.json").is_file() or not (is_adapter or settings):
        return Named(name, None)
    if not is_adapter:
        read_config(folder)  # which says what is missing
    settings = settings or {}
    base = settings.get("model") or Adapter.load(folder).base_model
    if not isinstance(base, str):
        raise SpectuneError(
            f"the adapter in {name} does not say which base it belongs to: name the model, and the adapter with -a"
        )
    quantize = settings.get("quantize")
    return Named(base, name, quantize if isinstance(quantize, str) else None)

"""A run folder, or an adapter's, in the place of a model: its base, with the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from spectune.adapters.adapter import Adapter
from spectune.adapters.folder import CONFIG
from spectune.errors import SpectuneError
from spectune.reading import read_yaml

SETTINGS = "config.yaml"  # of a run folder


class Named(NamedTuple):
    """What a name stands for.

    Args:
        base: the model.
        adapter: the folder of an adapter on it, or None.
    """

    base: str
    adapter: str | None


def named(name: str) -> Named:
    """Return the base that a name stands for, and the adapter on it where the name is a run's or an adapter's folder.

    Raises:
        SpectuneError: the folder is of an adapter that does not say which base it belongs to, or of a run that has
            not ended.
    """
    folder = Path(name)
    is_adapter, is_run = (folder / CONFIG).is_file(), (folder / SETTINGS).is_file()
    if (folder / "config.json").is_file() or not (is_adapter or is_run):
        return Named(name, None)
    base = None
    if is_run:
        settings = read_yaml(folder / SETTINGS)
        base = settings.get("model") if isinstance(settings, dict) else None
        if not is_adapter and base is not None:
            raise SpectuneError(f"{name} holds no adapter yet: its run has not ended; go on with resume=true")
    base = base or Adapter.load(folder).base_model
    if not isinstance(base, str):
        raise SpectuneError(
            f"the adapter in {name} does not say which base it belongs to: name the model, and the adapter with -a"
        )
    return Named(base, name)

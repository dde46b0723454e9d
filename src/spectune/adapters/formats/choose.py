"""Which format an adapter's folder has: PEFT's own for LoRA and DoRA, spectune's for the rest."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.folder import Source, read_config, write_folder
from spectune.adapters.formats import peft, spectune
from spectune.adapters.formats.peft_reading import load_peft
from spectune.errors import SpectuneError


def save(adapter: Contents, path: Path, *, embed: bool = False) -> Path:
    """Write an adapter's folder; LoRA and DoRA around LoRA in PEFT's format, all else in spectune's.

    Raises:
        SpectuneError: the adapter has no layers.
    """
    return write_folder(path, *contents(adapter, embed=embed), read=load)


def contents(adapter: Contents, *, embed: bool = False) -> tuple[dict[str, object], dict[str, Tensor], dict[str, str]]:
    """Return the config, the tensors and the metadata that `save` writes."""
    if not adapter.layers:
        raise SpectuneError("the adapter has no layers, so there is nothing to save")
    return peft.peft_contents(adapter) if peft.is_peft(adapter) else spectune.contents(adapter, embed=embed)


def load(path: Source) -> Contents:
    """Read an adapter's folder in either format."""
    config = read_config(path)
    foreign = config.get("library_name") != "spectune" and "peft_type" in config
    return load_peft(path) if foreign else spectune.load(path)

"""Where a result may go: one rule for every command that writes an adapter or a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.errors import SpectuneError
from spectune.reading import read_json

MERGED = "spectune.json"  # beside the weights of a merged model, by which a later export knows it as one of ours


def check_destination(
    out: Path, inputs: Iterable[str | os.PathLike[str]] = (), *, overwrite: bool = False, merged: bool = False
) -> None:
    """Raise unless a result may be written to a folder, before anything is loaded or computed.

    It may where nothing is yet or an empty folder, and with `overwrite` over an earlier result of the same kind; never
    over what it is made from, over a folder of another kind, or through a symbolic link.

    Args:
        out: the folder.
        inputs: folders that the result is made from; names that are none do not matter.
        overwrite: whether an earlier result may be replaced.
        merged: the result is a whole model, not an adapter.

    Raises:
        SpectuneError: it may not.
    """
    if out.is_symlink():
        raise SpectuneError(f"{out} is a symbolic link, through which nothing is written: name the folder itself")
    _check_inputs(out, inputs, merged)
    if not out.exists():
        _check_place(out)
        return
    if not out.is_dir():
        raise SpectuneError(f"{out} is a file: give a folder")
    if not os.access(out, os.W_OK | os.X_OK):
        raise SpectuneError(f"{out} cannot be written: its permissions forbid it; give another folder")
    if not any(out.iterdir()):
        return
    if not _is_ours(out, merged):
        kind = "a merged model that spectune wrote" if merged else "an adapter"
        raise SpectuneError(f"{out} exists and is not {kind}, so that it is not overwritten: give another folder")
    if not overwrite:
        raise SpectuneError(f"{out} exists: give another folder, or --overwrite to replace it")


def check_run_folder(out: Path, inputs: Iterable[str | os.PathLike[str]], mark: str, written: Iterable[str]) -> None:
    """Raise unless a run may write its files into a folder, whatever else there is.

    Args:
        out: the folder.
        inputs: folders and files that the run is made from; names that are none do not matter.
        mark: pattern of a file that is in every folder of such runs, before any other.
        written: names of the files that a run writes.

    Raises:
        SpectuneError: it is an input, or holds a model, a library or a file by one of these names that no run wrote.
    """
    _check_inputs(out, inputs, False)
    ours = any(out.glob(mark)) or (out / CONFIG).exists()
    foreign = next((name for name in (*written, "config.json", "library.json") if (out / name).exists()), None)
    if foreign is not None and not ours:
        raise SpectuneError(f"{out} holds a {foreign} that no run wrote: give another output")


def _check_inputs(out: Path, inputs: Iterable[str | os.PathLike[str]], merged: bool) -> None:
    for name in inputs:
        if Path(name).exists() and _holds(out.resolve(), Path(name).resolve(), merged):
            raise SpectuneError(f"{out} holds what the result is made from ({os.fspath(name)}): give another folder")


def _holds(out: Path, source: Path, merged: bool) -> bool:
    return source == out or (merged and out in source.parents)  # a model replaces its folder with all that is in it


def _check_place(out: Path) -> None:
    there = next((parent for parent in out.absolute().parents if os.path.lexists(parent)), None)
    if there is None or not there.is_dir():
        raise SpectuneError(f"{out} cannot be made: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SpectuneError(f"{out} cannot be made: the permissions of {there} forbid it; give another folder")


def _is_ours(out: Path, merged: bool) -> bool:
    if not merged:
        return (out / CONFIG).is_file() or (out / WEIGHTS).is_file()
    try:
        found = read_json(out / MERGED)
    except SpectuneError:
        return False
    return isinstance(found, dict) and found.get("library_name") == "spectune"

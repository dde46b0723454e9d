"""What values of a configuration mean as they are written: paths, numbers, YAML."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

from pydantic.fields import FieldInfo

from spectune.errors import SpectuneError
from spectune.reading import parse_yaml

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{\w*\})")


def in_full(value: Any) -> object:
    """Return paths of what is there in full; ids and all else stay as they are."""
    if isinstance(value, list):
        return [in_full(each) for each in value]
    if isinstance(value, dict):  # one of several sources, in a run's file as whoever wrote it left it
        return {**value, "path": in_full(value["path"])} if "path" in value else value
    there = isinstance(value, str) and (os.path.exists(value) or glob.glob(value))
    return os.path.abspath(value) if there else value


def written_out(value: Any) -> Any:
    """Return paths with the home folder and variables in full, as a shell writes them out and a file's are not.

    Raises:
        ValueError: a variable is not set.
    """
    if isinstance(value, list):
        return [written_out(each) for each in value]
    if isinstance(value, dict):
        return {**value, "path": written_out(value["path"])} if "path" in value else value
    if not isinstance(value, str) or os.path.exists(value):
        return value
    place = os.path.expandvars(os.path.expanduser(value))
    unset = _VARIABLE.search(place)
    if unset is not None:
        raise ValueError(f"{unset[0]} is not set in the environment")
    return place


def place_of(data: str) -> str:
    return os.path.abspath(data)  # an id, too, is then equal to itself only


def value_of(text: str, field: FieldInfo | None) -> object:
    """Return what a text on the command line means: what YAML makes of it, but text where a key takes nothing else."""
    if field is not None and field.annotation in (str, str | None):
        return None if field.annotation is not str and text in ("null", "~", "") else text
    try:
        value = parse_yaml(text, "the value")
    except SpectuneError:
        return text
    return number_of(value) if isinstance(value, str) else value


def number_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

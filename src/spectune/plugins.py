"""What comes from a user's own package: `module:name` in a setting, and the entry points of what is installed."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from functools import cache
from importlib import metadata
from types import ModuleType

from spectune.errors import SpectuneError, nearest


def imported(reference: str, what: str, example: str) -> object:
    """Import what `module:name` stands for, from the working directory or from what is installed.

    Args:
        reference: `module:name`; the name may have dots in it.
        what: what it is for, in messages.
        example: such a reference, with the file that it would be in.

    Raises:
        SpectuneError: no such module or name, or the module fails when it is imported.
    """
    module_name, colon, path = reference.partition(":")
    if not (module_name and colon and path):
        raise SpectuneError(f"{what} {reference!r} is not module:{example}")
    found: object = import_module_of_user(module_name, f"{what} {reference!r}")
    for part in path.split("."):
        if not hasattr(found, part):
            raise SpectuneError(f"{what} {reference!r}: {module_name} has no {part!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def import_module_of_user(name: str, what: str = "plugin") -> ModuleType:
    """Import a module from the working directory or from what is installed.

    Args:
        name: the module.
        what: what it is for, in messages.

    Raises:
        SpectuneError: there is none, or it fails when it is imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise SpectuneError(f"{what}: {name} needs the module {error.name!r}") from error
        raise SpectuneError(
            f"{what}: there is no module {error.name!r} in {os.getcwd()} or among what is installed"
        ) from None
    except Exception as error:  # whatever the module does when it is imported
        raise SpectuneError(f"{what}: importing {name} raised {type(error).__name__}: {error}{where(error)}") from error


@cache
def offered(group: str) -> dict[str, metadata.EntryPoint]:
    """Return the entry points of a group by name; none of them is loaded."""
    return {point.name: point for point in metadata.entry_points(group=group)}


def load(point: metadata.EntryPoint) -> object:
    """Return what an entry point stands for.

    Raises:
        SpectuneError: its package fails when it is imported.
    """
    try:
        return point.load()
    except Exception as error:  # whatever somebody else's package raises
        raise SpectuneError(
            f"{point.name!r} of {point.group} cannot be loaded from {point.value}: {type(error).__name__}: {error}"
        ) from error


def where(error: BaseException) -> str:
    """Return the file and line in which a user's code raised an error, for messages; empty where it is not known."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    frames = [f for f in frames if not f.filename.startswith("<frozen")]
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""

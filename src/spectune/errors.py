"""The one exception that a user's mistake raises: a sentence that names the culprit and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class SpectuneError(ValueError):
    """Bad input, told in one sentence; the command line prints it and exits with code 2."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the known names closest to `name`, or the empty string."""
    names = {each.casefold(): each for each in known}
    close = [names[each] for each in difflib.get_close_matches(name.casefold(), names, n=count, cutoff=0.4)]
    return "; did you mean " + " or ".join(repr(c) for c in close) + "?" if close else ""


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, of the processor or of a device."""
    # torch raises a plain RuntimeError for the processor's
    asked = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return asked or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def need(package: str, what: str, install: str | None = None) -> ModuleType:
    """Return a package that not every installation has.

    Args:
        package: its name.
        what: what needs it.
        install: what to give to pip, if that is another name.

    Raises:
        SpectuneError: it is not there, or lacks what it needs itself.
    """
    try:
        import_module(package.partition(".")[0])  # a part of it may have been imported before
        return import_module(package)
    except ImportError as error:
        raise SpectuneError(f"{what} needs {error.name or package}: pip install {install or package}") from None

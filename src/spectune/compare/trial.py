"""One run of one method at one learning rate and seed, and the file that holds its result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from spectune.errors import SpectuneError
from spectune.reading import read_json
from spectune.storage import open_itself, write_atomically

Result = dict[str, Any]  # of a trial: what its file holds, as `Bench.run` and `study` put it together
_DIGEST = "sha256"  # of the rest of a result
_ATTEMPTS = 3  # of a trial whose worker was killed, before it counts as failed


@dataclass(frozen=True)
class Trial:
    """What is run.

    Args:
        method: as `spectune train` takes it, or "full" or "base".
        lr: learning rate; None where nothing of the method's own is trained.
        seed: of the order of the data and of the method's start.
        kind: "search" for the learning rate, "final" for what counts, "time" for how long a step takes, or "start" for
            the rate that a search begins at.
        steps: at most; the comparison's own if not given.
    """

    method: str
    lr: float | None
    seed: int
    kind: Literal["search", "final", "time", "start"]
    steps: int | None = None

    @property
    def name(self) -> str:
        """The name of its file."""
        method = re.sub(r"[^\w.=-]+", "-", self.method)
        lr = "" if self.lr is None else f".lr{self.lr:g}"
        steps = "" if self.steps is None else f".{self.steps}steps"
        return f"{method}{lr}{steps}.{'' if self.kind == 'final' else f'{self.kind}.'}seed{self.seed}"


class Results:
    """The folder of results, one file a trial, which any number of workers on any number of machines share.

    A trial is claimed by a lock that the system releases when its worker ends, however it ends.

    Args:
        folder: the folder, made if need be.
        settings: name of the settings that all trials share.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder = folder
        self.settings = settings
        self.corrupt: list[str] = []
        self._known: dict[Trial, Result] = {}  # results do not change
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, trial: Trial) -> Result | None:
        """Return a trial's result, or None; a file that cannot be read goes, and its trial is to run again.

        Raises:
            SpectuneError: the file is the result of something else.
        """
        if trial in self._known:
            return self._known[trial]
        path = self._path(trial)
        try:
            if not path.exists():
                return None
            result = read_json(path)
            if result.pop(_DIGEST) != _digest(result):
                raise SpectuneError(f"{path} was changed after it was written")
            found = result["settings"], result["trial"]
        except (SpectuneError, KeyError, TypeError, AttributeError):
            self.corrupt.append(path.name)
            with suppress(OSError):  # a folder in its place is told of when the result is to be written
                path.unlink()
            return None
        if found != (self.settings, vars(trial)):
            raise SpectuneError(f"{path} is of another comparison: give another output, or overwrite=true")
        return self._known.setdefault(trial, result)

    def put(self, trial: Trial, result: Result) -> None:
        """Write a trial's result."""
        held = json.loads(json.dumps({"settings": self.settings, "trial": vars(trial), **result}))
        text = json.dumps({**held, _DIGEST: _digest(held)}, indent=1) + "\n"
        write_atomically(self._path(trial), lambda path: path.write_text(text, encoding="utf-8"))

    @contextmanager
    def claimed(self, trial: Trial) -> Iterator[bool]:
        """Within the context no other worker runs a trial; False where another does, or did."""
        path = self.folder / f".{trial.name}.lock"
        try:
            with FileLock(path, timeout=0):
                yield self.get(trial) is None
                path.unlink(missing_ok=True)  # whoever locks a new one finds the result
        except Timeout:
            yield False

    def attempt(self, trial: Trial) -> bool:
        """Note that a trial begins; False where workers were killed at it so often that it is given up."""
        path = self.folder / f".{trial.name}.attempts"
        with open_itself(path, "ab") as file:
            file.write(b".")
        return path.stat().st_size <= _ATTEMPTS

    def done(self, trial: Trial) -> None:
        """Forget the attempts at a trial."""
        (self.folder / f".{trial.name}.attempts").unlink(missing_ok=True)

    def clear(self, *, failed: bool = False) -> None:
        """Forget every attempt and result, or those alone that failed."""
        for path in self.folder.glob("*.json"):
            if not failed or _failed(path):
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".*.attempts"):
            path.unlink(missing_ok=True)

    def _path(self, trial: Trial) -> Path:
        return self.folder / f"{trial.name}.json"


def _digest(result: Result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _failed(path: Path) -> bool:
    try:
        return read_json(path)["error"] is not None
    except (SpectuneError, KeyError, TypeError):
        return False  # its trial runs again anyway

"""Results of a long run, one line of JSON each, that outlive its end."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spectune.reading import RECORD_BYTES, check_file
from spectune.storage import open_itself

LEDGER_BYTES = 4 << 30
_DIGEST = "sha256"  # of the rest of a line


class Ledger:
    """A file of JSON lines: a header that says what the results are of, and a line for each result.

    A file under another header is begun anew, and lines from the first that was cut short by a kill, or is not what was
    written, are dropped.

    Args:
        path: the file, made with its folder if need be.
        header: what all results depend on.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        head = json.dumps(header, sort_keys=True).encode() + b"\n"
        try:
            check_file(path, LEDGER_BYTES)
            with path.open("rb") as file:
                sound = self._read(file, head)
                more = bool(sound) and sound < file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            sound, more = 0, False
        if not sound:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_itself(path, "wb") as file:
                file.write(head)
        if more:
            with open_itself(path, "r+b") as file:
                file.truncate(sound)

    def _read(self, file: BinaryIO, head: bytes) -> int:
        """Read a file's results, line by line, and return how many of its bytes are sound."""
        if file.read(len(head)) != head:
            return 0
        sound = len(head)
        for line in iter(lambda: file.readline(RECORD_BYTES), b""):
            entry = _entry(line)
            if entry is None:
                break
            self.done[entry["name"]] = entry
            sound += len(line)
        return sound

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Write one result."""
        entry = json.loads(json.dumps({"name": name, **entry}))
        with open_itself(self.path, "ab") as file:
            file.write(json.dumps({**entry, _DIGEST: _digest(entry)}).encode() + b"\n")
        self.done[name] = entry


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    return entry if entry.pop(_DIGEST, None) == _digest(entry) else None


def _digest(entry: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def packed(values: np.ndarray) -> str:
    """Return numbers as base64 of little-endian float32."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """Return what `packed` was given, in float64."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)

"""A part of the check: rows of figures, kept as they come, of which one that fails leaves the others alone."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from spectune.pages.about import describe

T = TypeVar("T")


class Skipped(Exception):
    """What a row needs is not here."""


class Place(NamedTuple):
    """Where the check runs, and how large.

    Args:
        device: the card, or the CPU in the tiny form.
        tiny: sizes that take seconds on a CPU.
    """

    device: torch.device
    tiny: bool

    def of(self, real: T, tiny: T) -> T:
        """Return the size for this place."""
        return tiny if self.tiny else real

    def wait(self) -> None:
        """Wait for the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return how long a run takes, with what it leaves to the card."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def in_turn(self, sides: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
        """Return the seconds of each side's runs, made in turn after some to warm up."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(warm + rounds):
            for name, side in sides.items():
                took = self.seconds(side)
                if turn >= warm:
                    times[name].append(took)
        return times

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Return the bytes that a run takes of the card beside what is held before it, or None on a CPU."""
        if self.device.type != "cuda":
            run()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of runs made in turn."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 4)


class Part:
    """The rows of one part, in a file that the next run goes on from.

    Args:
        path: of the file.
        place: where it runs.
        seconds: that it may take.
        again: forget the rows of an earlier run.
    """

    def __init__(self, path: Path, place: Place, seconds: float, again: bool = False) -> None:
        self.path, self.place, self._machine = path, place, describe()
        self.rows: dict[str, dict[str, Any]] = {} if again else read(path).get("rows", {})
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left to the part."""
        return self._end - time.monotonic()

    def row(self, name: str, run: Callable[[], dict[str, Any]], needs: float = 0.0) -> None:
        """Keep what a run returns under a name, unless a run before this one did.

        A run that raises leaves its error, and one that finds something wrong says so with `"ok": False`.

        Args:
            name: of the row.
            run: () -> its figures.
            needs: seconds; with less time than this left it is not begun.
        """
        if is_done(self.rows.get(name)):
            return
        if self.left() <= needs:
            figures: dict[str, Any] = {"skipped": "the part's time is over"}
        else:
            start = time.perf_counter()
            try:
                figures = run()
            except Skipped as reason:
                figures = {"skipped": str(reason)}
            except Exception as error:  # whatever it is, the other rows are to run
                figures = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}
            figures = {**figures, "took_s": round(time.perf_counter() - start, 2)}
        self.rows[name] = figures
        self.save()
        told = {k: v for k, v in figures.items() if k not in ("traceback", "took_s")}
        print(f"  {name}: {json.dumps(told)[:300]}", flush=True)
        if self.place.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def save(self) -> None:
        """Write the file, in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_name(f"{self.path.name}.new")
        written.write_text(json.dumps({"machine": self._machine, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(written, self.path)


def read(path: Path) -> dict[str, Any]:
    """Return a part's file; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row failed, or found something that is not as it should be."""
    return "error" in row or row.get("ok") is False


def is_done(row: dict[str, Any] | None) -> bool:
    """Whether a row has its figures."""
    return row is not None and not is_wrong(row) and "skipped" not in row

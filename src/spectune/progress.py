"""Long work in sight: a bar on a terminal, a line now and then where output goes elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
_FIRST, _EVERY = 8.0, 60.0  # seconds until the first line, and between lines, where there is no terminal


class Bar:
    """Show how far some work is; work of a moment shows nothing where there is no terminal.

    Args:
        console: where to.
        what: is done, in a word or two.
        total: of the steps, where it is known.
        done: of them at the start.
    """

    def __init__(self, console: Console, what: str, total: int | None = None, done: int = 0) -> None:
        self._console, self._what, self._total, self._done, self._said = console, what, total, done, ""
        self._start = self._told = time.monotonic()
        self._before = done
        self._first = True
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        self._start = self._told = time.monotonic()
        if self._console.is_terminal and not self._console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._task = self._progress.add_task(self._what, total=self._total, completed=self._done, said="")
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __call__(self, done: int | None = None, said: str | None = None, total: int | None = None) -> None:
        """Say how many steps are done, and anything else; what is not given stays as it was."""
        self._done = self._done if done is None else done
        self._said = self._said if said is None else said
        self._total = self._total if total is None else total
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, total=self._total, said=self.text())
            return
        now = time.monotonic()
        if now - self._told >= (_FIRST if self._first else _EVERY):
            self.say()

    def say(self) -> None:
        """Write the line, whenever the last one was."""
        self._told, self._first = time.monotonic(), False
        if self._progress is None:
            self._console.print(f"{self._what}: {self.text()}", highlight=False, markup=False, soft_wrap=True)

    def text(self) -> str:
        """Return how far the work is, in words."""
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._done:,}{of}", self._said, self._left()]
        return ", ".join(part for part in parts if part)

    def _left(self) -> str:
        done = self._done - self._before
        if self._total is None or done <= 0 or self._done >= self._total:
            return ""
        return f"{spoken_time((time.monotonic() - self._start) / done * (self._total - self._done))} left"

    def over(self, items: Iterable[T], each: int = 100) -> Iterator[T]:
        """Yield items, counting them, within the bar's own context."""
        if self._total is None and isinstance(items, Sized):
            self._total = len(items)
        with self:
            for count, item in enumerate(items, start=1):
                yield item
                if count % each == 0:
                    self(count)


def spoken_time(seconds: float) -> str:
    """Return a time as people say it: 40 s, 5 min, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Counted(Sequence[T]):
    """A sequence that shows how far one is whenever it is gone through.

    Args:
        items: what it holds.
        console: where to show it.
        what: is done with them.
    """

    def __init__(self, items: Sequence[T], console: Console, what: str) -> None:
        self._items, self._console, self._what = items, console, what

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> object:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        return Bar(self._console, self._what).over(self._items)


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Within the context, show that something of unknown length is done: at once on a terminal, else now and then."""
    if console.quiet:
        yield
    elif console.is_terminal:
        with console.status(what):
            yield
    else:
        start, ended = time.monotonic(), threading.Event()

        def tell() -> None:
            wait = _FIRST
            while not ended.wait(wait):
                told = f"{what}: {spoken_time(time.monotonic() - start)} so far"
                console.print(told, highlight=False, markup=False, soft_wrap=True)
                wait = _EVERY

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

"""What is process-wide for as long as anybody needs it, and then gone again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

F = TypeVar("F")  # what is replaced


class WhileNeeded:
    """A process-wide effect that the first who needs it starts, and the last one ends.

    Args:
        start: starts it, and returns what ends it.
    """

    def __init__(self, start: Callable[[], Callable[[], None]]) -> None:
        self._start, self._stop = start, None
        self._count, self._lock = 0, threading.RLock()  # a finalizer may run while the lock is held by its thread

    def acquire(self) -> None:
        """Have the effect until `release`."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._stop = self._start()

    def release(self) -> None:
        """Need it no longer."""
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._stop is not None:
                self._stop, stop = None, self._stop
                stop()

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Have the effect within the context."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def replaced(owner: type | ModuleType, name: str, make: Callable[[F], F]) -> WhileNeeded:
    """Return the effect that an attribute of somebody else's class or module is another one.

    Args:
        owner: the class or module.
        name: the attribute.
        make: what there is -> what is there instead.
    """

    def start() -> Callable[[], None]:
        before = getattr(owner, name)
        ours = make(before)
        setattr(owner, name, ours)

        def stop() -> None:
            if getattr(owner, name) is ours:  # or somebody has replaced it after us, and calls ours
                setattr(owner, name, before)

        return stop

    return WhileNeeded(start)

"""What other threads hand to the engine's: requests that wait, calls to be made between two steps, and its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Condition
from typing import Any, TypeVar

from spectune.serving.jobs import Busy, Closing, Job
from spectune.serving.shelf import Version

T = TypeVar("T")
Call = tuple[Callable[[], Any], Future[Any]]


class Inbox:
    """Guards all that more than one thread writes with one lock; what runs is the engine's own and needs none.

    Args:
        most: requests that may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Job] = deque()
        self._calls: deque[Call] = deque()
        self._closing = False
        self._stalled = False  # whether those that wait, wait for adapters to be read
        self._woken = Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    # -- for any thread

    def put(self, job: Job, mixture: Callable[[], dict[Version, object]]) -> None:
        """Take on a request, with what its names stand for now: no version of them goes before the request is seen.

        Raises:
            Busy: too many wait.
            Closing: the server is being shut down.
        """
        with self._woken:
            self._check_open()
            if len(self._waiting) >= self._most:
                raise Busy(f"{len(self._waiting)} requests wait already; try again in a while")
            job.mixture = mixture()
            self._waiting.append(job)
            self._wake()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have something done between two steps.

        Raises:
            Closing: the server is being shut down.
        """
        future: Future[T] = Future()
        with self._woken:
            self._check_open()
            self._calls.append((function, future))
            self._woken.notify()
        return future

    def cancel(self, job: Job) -> None:
        """Say that nobody waits for a request any more."""
        with self._woken:
            job.cancelled = True
            self._wake()

    def came(self, version: Version) -> None:
        """Say that an adapter is on the model, or will not come: who waits is to be looked at again."""
        with self._woken:
            version.coming = False
            self._wake()

    def close(self) -> None:
        """Take nothing on any more."""
        with self._woken:
            self._closing = True
            self._woken.notify()

    def _check_open(self) -> None:
        if self._closing:
            raise Closing("the server is being shut down")

    def _wake(self) -> None:
        self._stalled = False
        self._woken.notify()

    # -- for the engine's thread

    def next(self, busy: bool) -> tuple[deque[Call], bool]:
        """Wait for something to do, unless the engine is busy; return the calls, and whether it is to end."""
        with self._woken:
            while not (self._calls or busy or self._closing or (self._waiting and not self._stalled)):
                if not self._woken.wait(0.1 if self._waiting else None):
                    break  # those that wait may have waited too long
            calls, self._calls = self._calls, deque()
            return calls, self._closing

    @contextmanager
    def held(self) -> Iterator[deque[Job]]:
        """Within the context nobody hands anything in; it has the requests that wait, in the order they came."""
        with self._woken:
            yield self._waiting

    def take(self, jobs: Iterable[Job], *, stalled: bool) -> None:
        """Take requests out of those that wait, and say whether the others wait for adapters alone."""
        with self._woken:
            for job in jobs:
                self._waiting.remove(job)
            self._stalled = stalled

    def take_where(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take the requests out of those that wait that a function is true of, and return them."""
        with self._woken:
            jobs = list(filter(gone, self._waiting))
            for job in jobs:
                self._waiting.remove(job)
        return jobs

"""An engine that is none: it says what it was told to say."""

from typing import Any

from serving.at_once import at_once
from spectune.serving.jobs import Event

TALK = {"model": "a0", "messages": [{"role": "user", "content": "say"}]}


class Told:
    """Answers each request with what it was told to say, or fails as it was told to."""

    def __init__(self, shelf: Any) -> None:
        self.shelf, self.alive = shelf, True
        self.events: list[Event] = [Event(0, "ahoy", (), 2, None), Event(0, " there", (), 3, "stop")]
        self.error: Exception | None = None
        self.jobs: list[Any] = []
        self.cancelled: list[Any] = []

    def submit(self, job: Any) -> None:
        if self.error is not None:
            raise self.error
        self.jobs.append(job)
        for event in self.events:
            job.deliver([event])

    def cancel(self, job: Any) -> None:
        self.cancelled.append(job)

    def call(self, function: Any) -> Any:
        return at_once(function)

    def load(self, version: Any, read: Any, *, replace: bool = False) -> Any:
        return self.call(lambda: self.shelf.put(version.name, read(), version.path, replace=replace))

"""Requests as the engine has them, what comes of them, and how many it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spectune.errors import SpectuneError
from spectune.serving.batch import Row
from spectune.serving.sampling import Logprobs
from spectune.serving.shelf import Version


class Busy(SpectuneError):
    """More requests wait than may."""


class Closing(SpectuneError):
    """The server is being shut down."""


class TooSlow(SpectuneError):
    """A request took longer than it may."""


class Event(NamedTuple):
    """What came of a request since the last event.

    Args:
        row: which of the request's replies.
        text: that is certain.
        logprobs: of tokens, where asked for.
        tokens: of the reply so far.
        finish: why the reply ended: "stop" or "length".
        error: why there is none; of the whole request.
    """

    row: int
    text: str = ""
    logprobs: Sequence[Logprobs] = ()
    tokens: int = 0
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A request.

    Args:
        rows: its replies.
        weights: of adapters by name; none is the base.
        deliver: takes its events, in the engine's thread, and must not wait.
        seconds: that it may take, None for any time.

    Attributes:
        mixture: what the names stood for when the request came.
        left: rows that have not ended.
        cancelled: nobody waits for it any more.
    """

    rows: list[Row]
    weights: Mapping[str, object]
    deliver: Callable[[list[Event]], None]
    seconds: float | None = None
    mixture: dict[Version, object] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    left: list[Row] = field(default_factory=list)
    cancelled: bool = False

    @property
    def late(self) -> bool:
        """Whether it took longer than it may."""
        return self.seconds is not None and time.monotonic() - self.began > self.seconds


@dataclass(frozen=True)
class Limits:
    """What an engine takes on.

    Args:
        rows: that are answered at once.
        waiting: requests that wait for a row.
        tokens: rows times the length of the longest, whose keys and values fit into memory; None is any.
        columns: tokens of prompts that are read between two steps of the rows.
    """

    rows: int = 16
    waiting: int = 1024
    tokens: int | None = None
    columns: int = 512

    def check(self, job: Job) -> None:
        """Refuse a request that would never fit.

        Raises:
            SpectuneError: a reply may become longer than what memory holds.
        """
        longest = max(row.most for row in job.rows)
        if self.tokens is not None and longest > self.tokens:
            raise SpectuneError(
                f"the prompt and its reply may take {longest} tokens, and memory holds {self.tokens}: ask for fewer "
                "with max_tokens"
            )

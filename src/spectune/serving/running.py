"""The requests that are being answered: whose each row is, what a step gives it, and what is told of it."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from torch import Tensor

from spectune.errors import SpectuneError
from spectune.serving.batch import Batch, Row
from spectune.serving.jobs import Event, Job
from spectune.serving.prefixes import origin_of

_Events = defaultdict[Job, list[Event]]
log = logging.getLogger("spectune.serving")
_NOT_A_NUMBER = (
    "the model's answer is no number (NaN): the weights of the mixture may be too large, or the dtype too small"
)


class Running:
    """Belongs to the engine's thread.

    Args:
        batch: that has the rows' places.

    Attributes:
        jobs: the requests, in the order in which they began.
        unread: rows that have no place yet.
        tokens: that were answered so far.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._job_of: dict[Row, Job] = {}
        self.jobs: list[Job] = []
        self.unread: deque[Row] = deque()
        self.tokens = 0

    def __contains__(self, row: Row) -> bool:
        """Whether a row is still to be answered."""
        return row in self._job_of

    def __len__(self) -> int:
        """Rows that are being answered or read."""
        return len(self._job_of)

    def begin(self, job: Job) -> None:
        """Take on a request whose adapters are on the model."""
        job.left = list(job.rows)
        for row in job.rows:
            row.mixture = {version.slot: weight for version, weight in job.mixture.items() if version.slot}
            row.origin = origin_of(job.mixture)
        self.jobs.append(job)
        self.unread.extend(job.rows)
        self._job_of.update(dict.fromkeys(job.rows, job))

    def fail(self, job: Job, error: Exception) -> None:
        """End a request before its replies are complete; one that has not begun too."""
        for row in job.left:
            del self._job_of[row]
            if row in self._batch.rows:
                self._batch.leave(row)
            elif row in self.unread:
                self.unread.remove(row)
        job.left = []
        if job in self.jobs:
            self.jobs.remove(job)
        if not job.cancelled:
            job.deliver([Event(0, error=error)])

    def blame(self, rows: Iterable[Row], error: Exception) -> None:
        """End the requests of rows that something failed for."""
        if not isinstance(error, SpectuneError):
            log.error("a request failed", exc_info=error)
        for job in {self._job_of[row] for row in rows if row in self._job_of}:
            self.fail(job, error)

    def take(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Have rows take a token each, and tell of it. A row that ends is no request's any more."""
        events: _Events = defaultdict(list)
        # one copy to the processor for all rows, most of which take the likeliest
        largest, likeliest = (values.tolist() for values in logits.max(-1))
        for i, row in enumerate(rows):
            if largest[i] != largest[i]:
                self.blame([row], SpectuneError(_NOT_A_NUMBER))
            elif row in self._job_of:
                self._take(row, logits[i], likeliest[i] if row.sampler.plain else None, events)
        for job, some in events.items():
            if not job.cancelled:
                job.deliver(some)

    def _take(self, row: Row, logits: Tensor, token: int | None, events: _Events) -> None:
        job = self._job_of[row]
        try:
            text, finish = row.take(logits, token)
        except Exception as error:
            self.blame([row], error)
            return
        self.tokens += 1
        if text or finish:
            told, row.told = row.told, []
            events[job].append(Event(job.rows.index(row), text, told, len(row.tokens), finish))
        if finish:
            job.left.remove(row)
            del self._job_of[row]
            if not job.left:
                self.jobs.remove(job)

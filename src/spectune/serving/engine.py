"""One thread that owns the model: it reads prompts, has all rows take a step, and lets rows come and go between."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Any, TypeVar

from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.serving.batch import Batch, Prompts, Row, unread
from spectune.serving.jobs import Busy, Closing, Event, Job, Limits, TooSlow
from spectune.serving.loader import Loader
from spectune.serving.prefixes import mentions, origin_of
from spectune.serving.shelf import Shelf, Version

T = TypeVar("T")
_Events = defaultdict[Job, list[Event]]
log = logging.getLogger("spectune.serving")
_NOT_A_NUMBER = (
    "the model's answer is no number (NaN): the weights of the mixture may be too large, or the dtype too small"
)


class Engine:
    """Answers requests, with rows that join and leave at every step.

    Args:
        batch: of the model.
        shelf: its adapters.
        pad: a token to pad prompts with.
        limits: what it takes on.

    Attributes:
        steps, prompt_tokens, tokens: that were computed so far.
    """

    def __init__(self, batch: Batch, shelf: Shelf, pad: int = 0, limits: Limits | None = None) -> None:
        self.batch, self.shelf, self.limits = batch, shelf, limits or Limits()
        self._pad, self.steps, self.prompt_tokens, self.tokens = pad, 0, 0, 0
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: list[Job] = []
        self._job_of: dict[Row, Job] = {}
        self._unread: deque[Row] = deque()  # rows of running jobs that have no place yet
        self._prompts: Prompts | None = None
        self._kept: set[Version] = set()  # that requests wait for, which come before those that could have them go
        self._stalled = False  # whether those that wait, wait for adapters to be read
        self._loader = Loader(shelf, self.call, self._in_use, self._came)
        # guards what other threads write: who waits, what is to be called, and whether it is closing. What runs is the
        # engine's own and needs no lock
        self._woken = Condition()
        self._closing = False
        self._thread = Thread(target=self._run, name="spectune-engine", daemon=True)

    # -- for any thread

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows that are being answered or read."""
        return len(self._job_of)

    def submit(self, job: Job) -> None:
        """Take on a request, which is answered by the adapters that have its names now.

        Raises:
            Busy: too many wait.
            Closing: the server is being shut down.
            UnknownAdapter: a name that no adapter has.
            SpectuneError: it would never fit into memory.
        """
        if self.shelf.most is not None and len(job.weights) > self.shelf.most:
            raise SpectuneError(
                f"the mixture has {len(job.weights)} adapters, and {self.shelf.most} are held at once; start with a "
                "larger --max-adapters, or add them up with `spectune compose`"
            )
        self.limits.check(job)
        with self._woken:
            if self._closing:
                raise Closing("the server is being shut down")
            if len(self._waiting) >= self.limits.waiting:
                raise Busy(f"{len(self._waiting)} requests wait already; try again in a while")
            job.mixture = self.shelf.mixture(job.weights)
            self._waiting.append(job)
            self._stalled = False
            self._woken.notify()

    def cancel(self, job: Job) -> None:
        """Free the rows of a request that nobody waits for any more; one that has ended stays so."""
        with self._woken:
            job.cancelled = True
            self._stalled = False
            self._woken.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have something done between two steps, when nothing else uses the model."""
        future: Future[T] = Future()
        with self._woken:
            if self._closing:
                raise Closing("the server is being shut down")
            self._calls.append((function, future))
            self._woken.notify()
        return future

    def stop(self, timeout: float | None = None) -> None:
        """End: requests that have not ended by now get an error."""
        with self._woken:
            self._closing = True
            self._woken.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._loader.stop()

    def load(self, version: Version, read: Callable[[], Adapter], *, replace: bool = False) -> Future[Version]:
        """Have an adapter read and checked beside what runs, and put on the model between two steps: `Loader.load`."""
        return self._loader.load(version, read, replace=replace)

    # -- in the engine's thread

    def _in_use(self) -> set[Version]:
        """Return the adapters of requests that run, and of those whose turn is next."""
        with self._woken:
            wanted = {version for job in self._waiting for version in job.mixture}
        return (self._kept & wanted).union(*(job.mixture for job in self._running))

    def _came(self, version: Version) -> None:
        """Look again at who waits: an adapter is on the model, or will not come."""
        with self._woken:
            version.coming, self._stalled = False, False
            self._woken.notify()

    def _run(self) -> None:
        while True:
            with self._woken:
                while not (self._calls or self._running or self._closing or (self._waiting and not self._stalled)):
                    if not self._woken.wait(0.1 if self._waiting else None):
                        break  # those that wait may have waited too long
                calls, self._calls = self._calls, deque()
                closing = self._closing
            if closing:
                self._end(calls)
                return
            for function, future in calls:
                self._do(function, future)
            try:
                self._drop()
                self._admit()
                self._read()
                self._step()
                self._sweep()
            except Exception as error:  # nothing known raises here; whatever does must not end all answers to come
                log.exception("an unforeseen error ended the requests that ran")
                self._end_running(error)

    def _do(self, function: Callable[[], object], future: Future[object]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        # a route that stays open would go on answering with adapters that the function may take away
        self.batch.close()
        try:
            future.set_result(function())
        except BaseException as error:  # whatever it is, whoever waits is told
            future.set_exception(error)

    def _end(self, calls: Iterable[tuple[object, Future[object]]]) -> None:
        error = Closing("the server was shut down before the reply was complete")
        for _, future in calls:
            future.set_exception(error)
        self._end_running(error)
        for job in self._waiting:
            self._fail(job, error)
        self._waiting.clear()

    def _end_running(self, error: Exception) -> None:
        self.batch.clear()
        self._prompts = None
        for job in list(self._running):
            self._fail(job, error)

    def _drop(self) -> None:
        """Let go of requests that nobody waits for, or that took too long."""
        with self._woken:
            gone = [job for job in self._waiting if job.cancelled or job.late]
            for job in gone:
                self._waiting.remove(job)
        for job in [*gone, *(job for job in self._running if job.cancelled or job.late)]:
            self._fail(
                job,
                TooSlow(f"no complete reply within {job.seconds} s; ask for fewer tokens (max_tokens), or again later"),
            )

    def _fail(self, job: Job, error: Exception) -> None:
        """End a request before its replies are complete."""
        for row in job.left:
            del self._job_of[row]
            if row in self.batch.rows:
                self.batch.leave(row)
            elif row in self._unread:
                self._unread.remove(row)
        job.left = []
        if job in self._running:
            self._running.remove(job)
        if not job.cancelled:
            job.deliver([Event(0, error=error)])

    def _admit(self) -> None:
        """Begin with requests in the order in which they came, as long as there are rows and memory for them."""
        if self._prompts is not None:
            return
        there, free = self.batch.rows, self.limits.rows - len(self.batch.rows)
        if len(self._unread) < free and self._waiting:
            self._begin(free)
        rows, first = list[Row](), 0
        longest = max((row.most for row in there), default=0)
        while self._unread and len(rows) < free:
            count, longest = len(there) + len(rows) + 1, max(longest, self._unread[0].most)
            if count > 1 and self.limits.tokens is not None and count * longest > self.limits.tokens:
                break
            own = unread(self._unread[0], self.batch.prefixes)
            if rows and not first / 2 - 32 <= own <= 2 * first + 32:
                break  # all of them are read as far as the one that needs most
            first = first if rows else own
            rows.append(self._unread.popleft())
        if rows:
            self._prompts = Prompts(rows, self._pad, self.batch.prefixes)

    def _begin(self, free: int) -> None:
        """Begin with requests whose adapters are on the model, and have those read that others wait for.

        Who waits for an adapter that is being read is overtaken; who waits for room for one is not, so that everybody's
        turn comes.
        """
        with self._woken:
            waiting = list(self._waiting)
        self._kept, ready, failed = set(), list[Job](), list[tuple[Job, Exception]]()
        running = {version for job in self._running for version in job.mixture}
        for job in waiting:
            if len(self._unread) + sum(len(other.rows) for other in ready) >= free:
                break
            missing = [version for version in job.mixture if version.slot is None]
            error = next((version.failed for version in missing if version.failed), None)
            if error is not None:
                failed.append((job, error))
                continue
            kept = self._kept | job.mixture.keys()
            # with room for those before it too, whose adapters may be on their way
            if not self.shelf.fits([version for version in kept if version.slot is None], running | kept):
                break
            self._kept = kept
            if not missing:
                ready.append(job)
                running |= job.mixture.keys()
                continue
            for version in missing:
                if not version.coming:
                    version.coming = True
                    self._loader.bring(version)
        with self._woken:
            for job in (*ready, *(job for job, _ in failed)):
                self._waiting.remove(job)
            self._stalled = not ready and not self._running
        for job, error in failed:
            for version in job.mixture:
                version.failed = None  # the next one may find it mended
            self._fail(job, error)
        for job in ready:
            self.shelf.touch(job.mixture)
            job.left = list(job.rows)
            for row in job.rows:
                row.mixture = {version.slot: weight for version, weight in job.mixture.items() if version.slot}
                row.origin = origin_of(job.mixture)
            self._running.append(job)
            self._unread.extend(job.rows)
            self._job_of.update(dict.fromkeys(job.rows, job))

    def _read(self) -> None:
        """Read a part of the prompts of the rows that are about to join."""
        prompts = self._prompts
        if prompts is None:
            return
        try:
            logits = self.batch.read(prompts, max(32, self.limits.columns // len(prompts.rows)))
        except Exception as error:
            self._prompts = None
            self._blame(prompts.rows, error) if len(prompts.rows) == 1 else self._read_alone(prompts.rows)
            return
        if logits is not None or not any(row in self._job_of for row in prompts.rows):
            self._prompts = None
        if logits is not None:
            self._joined(prompts, logits)

    def _read_alone(self, rows: Sequence[Row]) -> None:
        """Read the prompts of rows one by one, after they could not be read together."""
        for row in rows:
            prompts = Prompts([row], self._pad)
            try:
                logits = self.batch.read(prompts, len(row.prompt))
            except Exception as error:
                self._blame([row], error)
            else:
                assert logits is not None
                self._joined(prompts, logits)

    def _joined(self, prompts: Prompts, logits: Tensor) -> None:
        self.prompt_tokens += sum(len(row.prompt) for row in prompts.rows)
        self._tell(self._taken(prompts.rows, logits))
        self.batch.keep_prompts(prompts)
        going = [i for i, row in enumerate(prompts.rows) if row in self._job_of]
        if going:
            self.batch.join(prompts, going)

    def _step(self) -> None:
        """Have each row take a token."""
        rows = list(self.batch.rows)
        if not rows:
            return
        try:
            logits = self.batch.step()
        except Exception as error:
            self._failed(error)
            return
        self.steps += 1
        self._tell(self._taken(rows, logits))
        for row in rows:
            if row not in self._job_of and row in self.batch.rows:
                self.batch.keep_row(row)
                self.batch.leave(row)

    def _taken(self, rows: Sequence[Row], logits: Tensor) -> _Events:
        """Have rows take a token each; return what there is to tell. A row that ends is no job's any more."""
        events: _Events = defaultdict(list)
        largest, likeliest = (values.tolist() for values in logits.max(-1))
        for i, row in enumerate(rows):
            if largest[i] != largest[i]:
                self._blame([row], SpectuneError(_NOT_A_NUMBER))
            elif row in self._job_of:
                self._take(row, logits[i], likeliest[i] if row.sampler.plain else None, events)
        return events

    def _failed(self, error: Exception) -> None:
        """End the requests that a step failed for: those that fail alone too, or else all."""
        # each is tried by itself, so that one bad request does not end those of others
        culprits = self.batch.culprits()
        if not culprits:
            self._blame(self.batch.rows, error)
        for row, own in culprits:
            self._blame([row], own)

    def _blame(self, rows: Iterable[Row], error: Exception) -> None:
        if not isinstance(error, SpectuneError):
            log.error("a request failed", exc_info=error)
        for job in {self._job_of[row] for row in rows if row in self._job_of}:
            self._fail(job, error)

    def _take(self, row: Row, logits: Tensor, token: int | None, events: _Events) -> None:
        job = self._job_of[row]
        try:
            text, finish = row.take(logits, token)
        except Exception as error:
            self._blame([row], error)
            return
        self.tokens += 1
        if text or finish:
            told, row.told = row.told, []
            events[job].append(Event(job.rows.index(row), text, told, len(row.tokens), finish))
        if finish:
            job.left.remove(row)
            del self._job_of[row]
            if not job.left:
                self._running.remove(job)

    def _tell(self, events: _Events) -> None:
        for job, some in events.items():
            if not job.cancelled:
                job.deliver(some)

    def _sweep(self) -> None:
        """Take adapters off the model that no name stands for and no request uses."""
        with self._woken:
            gone = self.shelf.unused(v for job in (*self._running, *self._waiting) for v in job.mixture)
        if gone:
            self.batch.close()
            self.shelf.remove(gone)
            if self.batch.prefixes is not None:
                self.batch.prefixes.forget(mentions(gone))

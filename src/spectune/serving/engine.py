"""One thread that owns the model: it reads prompts, has all rows take a step, and lets rows come and go between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.serving.batch import Batch, Prompts, Row, unread
from spectune.serving.inbox import Inbox
from spectune.serving.jobs import Closing, Job, Limits, TooSlow
from spectune.serving.loader import Loader
from spectune.serving.prefixes import mentions
from spectune.serving.running import Running
from spectune.serving.shelf import Shelf, Version

T = TypeVar("T")
log = logging.getLogger("spectune.serving")


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
        self._pad, self.steps, self.prompt_tokens = pad, 0, 0
        self._inbox, self._running = Inbox(self.limits.waiting), Running(batch)
        self._prompts: Prompts | None = None
        self._kept: set[Version] = set()  # that requests wait for, which come before those that could have them go
        self._loader = Loader(shelf, self.call, self._in_use, self._inbox.came)
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
        return len(self._inbox)

    @property
    def rows(self) -> int:
        """Rows that are being answered or read."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """Tokens that were answered so far."""
        return self._running.tokens

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
        self._inbox.put(job, lambda: self.shelf.mixture(job.weights))

    def cancel(self, job: Job) -> None:
        """Free the rows of a request that nobody waits for any more; one that has ended stays so."""
        self._inbox.cancel(job)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have something done between two steps, when nothing else uses the model."""
        return self._inbox.call(function)

    def stop(self, timeout: float | None = None) -> None:
        """End: requests that have not ended by now get an error."""
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._loader.stop()

    def load(self, version: Version, read: Callable[[], Adapter], *, replace: bool = False) -> Future[Version]:
        """Have an adapter read and checked beside what runs, and put on the model between two steps: `Loader.load`."""
        return self._loader.load(version, read, replace=replace)

    # -- in the engine's thread

    def _in_use(self) -> set[Version]:
        """Return the adapters of requests that run, and of those whose turn is next."""
        with self._inbox.held() as waiting:
            wanted = {version for job in waiting for version in job.mixture}
        return (self._kept & wanted).union(*(job.mixture for job in self._running.jobs))

    def _run(self) -> None:
        while True:
            calls, closing = self._inbox.next(busy=bool(self._running.jobs))
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
        for job in self._inbox.take_where(lambda job: True):
            self._running.fail(job, error)

    def _end_running(self, error: Exception) -> None:
        self.batch.clear()
        self._prompts = None
        for job in list(self._running.jobs):
            self._running.fail(job, error)

    def _drop(self) -> None:
        """Let go of requests that nobody waits for, or that took too long."""

        def over(job: Job) -> bool:
            return job.cancelled or job.late

        for job in [*self._inbox.take_where(over), *filter(over, self._running.jobs)]:
            told = f"no complete reply within {job.seconds} s; ask for fewer tokens (max_tokens), or again later"
            self._running.fail(job, TooSlow(told))

    def _admit(self) -> None:
        """Begin with requests in the order in which they came, as long as there are rows and memory for them."""
        if self._prompts is not None:
            return
        there, free = self.batch.rows, self.limits.rows - len(self.batch.rows)
        unread_rows = self._running.unread
        if len(unread_rows) < free and len(self._inbox):
            self._begin(free)
        rows, first = list[Row](), 0
        longest = max((row.most for row in there), default=0)
        while unread_rows and len(rows) < free:
            count, longest = len(there) + len(rows) + 1, max(longest, unread_rows[0].most)
            if count > 1 and self.limits.tokens is not None and count * longest > self.limits.tokens:
                break
            own = unread(unread_rows[0], self.batch.prefixes)
            if rows and not first / 2 - 32 <= own <= 2 * first + 32:
                break  # all of them are read as far as the one that needs most
            first = first if rows else own
            rows.append(unread_rows.popleft())
        if rows:
            self._prompts = Prompts(rows, self._pad, self.batch.prefixes)

    def _begin(self, free: int) -> None:
        """Begin with requests whose adapters are on the model, and have those read that others wait for.

        Who waits for an adapter that is being read is overtaken; who waits for room for one is not, so that everybody's
        turn comes.
        """
        with self._inbox.held() as held:
            waiting = list(held)
        self._kept, ready, failed = set(), list[Job](), list[tuple[Job, Exception]]()
        running = {version for job in self._running.jobs for version in job.mixture}
        for job in waiting:
            if len(self._running.unread) + sum(len(other.rows) for other in ready) >= free:
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
        self._inbox.take([*ready, *(job for job, _ in failed)], stalled=not ready and not self._running.jobs)
        for job, error in failed:
            for version in job.mixture:
                version.failed = None  # the next one may find it mended
            self._running.fail(job, error)
        for job in ready:
            self.shelf.touch(job.mixture)
            self._running.begin(job)

    def _read(self) -> None:
        """Read a part of the prompts of the rows that are about to join."""
        prompts = self._prompts
        if prompts is None:
            return
        try:
            logits = self.batch.read(prompts, max(32, self.limits.columns // len(prompts.rows)))
        except Exception as error:
            self._prompts = None
            self._running.blame(prompts.rows, error) if len(prompts.rows) == 1 else self._read_alone(prompts.rows)
            return
        if logits is not None or not any(row in self._running for row in prompts.rows):
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
                self._running.blame([row], error)
            else:
                assert logits is not None
                self._joined(prompts, logits)

    def _joined(self, prompts: Prompts, logits: Tensor) -> None:
        self.prompt_tokens += sum(len(row.prompt) for row in prompts.rows)
        self._running.take(prompts.rows, logits)
        self.batch.keep_prompts(prompts)
        going = [i for i, row in enumerate(prompts.rows) if row in self._running]
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
        self._running.take(rows, logits)
        for row in rows:
            if row not in self._running and row in self.batch.rows:
                self.batch.keep_row(row)
                self.batch.leave(row)

    def _failed(self, error: Exception) -> None:
        """End the requests that a step failed for: those that fail alone too, or else all."""
        # each is tried by itself, so that one bad request does not end those of others
        culprits = self.batch.culprits()
        if not culprits:
            self._running.blame(self.batch.rows, error)
        for row, own in culprits:
            self._running.blame([row], own)

    def _sweep(self) -> None:
        """Take adapters off the model that no name stands for and no request uses."""
        with self._inbox.held() as waiting:
            gone = self.shelf.unused(v for job in (*self._running.jobs, *waiting) for v in job.mixture)
        if gone:
            self.batch.close()
            self.shelf.remove(gone)
            if self.batch.prefixes is not None:
                self.batch.prefixes.forget(mentions(gone))

"""The thread that reads adapters beside what runs, and has the engine put them on the model between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from spectune.adapters.adapter import Adapter
from spectune.serving.jobs import Closing
from spectune.serving.shelf import Shelf, Unreadable, Version

T = TypeVar("T")
log = logging.getLogger("spectune.serving")


class _Call(Protocol):
    """`Engine.call`: have something done between two steps."""

    def __call__(self, function: Callable[[], T]) -> Future[T]: ...


class Loader:
    """Reads adapters, one after another.

    Only what needs the model to itself waits for the engine: room is made, and what is ready is put in place.  Reading
    and checking, which take seconds, go on while rows take steps.

    Args:
        shelf: of the model's adapters.
        call: has something done between two steps.
        in_use: which adapters must stay where they are; asked between two steps.
        came: is told of each that was brought back, or cannot be.
    """

    def __init__(
        self, shelf: Shelf, call: _Call, in_use: Callable[[], set[Version]], came: Callable[[Version], None]
    ) -> None:
        self._shelf, self._call, self._in_use, self._came = shelf, call, in_use, came
        # one thread: two adapters in preparation would need room for both, which neither could tell of the other
        self._thread = ThreadPoolExecutor(1, "spectune-load")

    def load(self, version: Version, read: Callable[[], Adapter], *, replace: bool = False) -> Future[Version]:
        """Have an adapter read and checked beside what runs, and put on the model between two steps.

        Args:
            version: what it will be; it gets its name when it is there.
            read: reads it.
            replace: whether another one may have its name.
        """

        def put() -> Version:
            if not replace:
                self._shelf.check_free(version.name)
            return self._placed(version, read(), replace=replace)

        return self._thread.submit(put)

    def bring(self, version: Version) -> None:
        """Have an adapter on the model again that was set aside."""
        self._thread.submit(self._bring, version)

    def stop(self) -> None:
        """End; what is being read is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _placed(self, version: Version, adapter: Adapter, **options: bool) -> Version:
        self._call(lambda: self._shelf.reserve(version, self._in_use())).result()
        try:
            ready = self._shelf.prepare(version, adapter)
            return self._call(lambda: self._shelf.place(version, ready, **options)).result()
        except BaseException:
            self._shelf.release()
            raise

    def _bring(self, version: Version) -> None:
        try:
            assert version.read is not None
            self._placed(version, version.read(), named=False)
            self._shelf.reads += 1
        except Exception as error:  # whatever it is, whoever waits for the adapter is told
            log.error("the adapter %r cannot be had again: %s", version.name, error)
            told = f"the adapter {version.name!r} cannot be had again: {error}"
            version.failed = error if isinstance(error, (Closing, Unreadable)) else Unreadable(told)
        finally:
            self._came(version)

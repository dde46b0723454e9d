"""Long work in pieces, which whoever only counts it need not do piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

# of who counts work on the meta device instead of having it done: what is done within counted(n) is done n times over
counted: ContextVar[Callable[[int], AbstractContextManager[None]] | None] = ContextVar("counted", default=None)


def pieces(count: int, step: int) -> Iterator[slice]:
    """Yield `count` rows, `step` at once, or an empty piece; where work is counted, one for all that are as long."""
    times = counted.get()
    if times is None or count < 2 * step:
        yield from (slice(start, min(start + step, count)) for start in range(0, max(count, 1), step))
        return
    whole, rest = divmod(count, step)
    with times(whole):
        yield slice(0, step)
    if rest:
        yield slice(count - rest, count)

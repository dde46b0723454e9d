"""What calls as the engine does between two steps."""

from concurrent.futures import Future
from typing import Any


def at_once(function: Any) -> Any:
    """Return what a function comes to, as a future that is done."""
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    return future

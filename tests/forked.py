"""A child of this process, which has imported everything already, to be killed or limited."""

from __future__ import annotations

import os
from collections.abc import Callable


def ended(act: Callable[[], object]) -> int:
    """Do something in a forked child and return how it ended: 0, 1 where it raised, or the signal, negative."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

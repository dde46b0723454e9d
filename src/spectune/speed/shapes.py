"""Numbers that the fast paths share."""

from __future__ import annotations

import os

IGNORE = -100


STEP = 16  # rows, whose multiples products are filled up to, so that they have few different shapes


def switched_off() -> bool:
    """Whether the user keeps to PyTorch: `SPECTUNE_KERNELS=off`."""
    return os.environ.get("SPECTUNE_KERNELS") == "off"

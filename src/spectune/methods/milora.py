"""MiLoRA: minor singular component adaptation (arXiv 2406.09044)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from spectune.methods.pissa import PiSSA
from spectune.methods.registry import register


@register
@dataclass(frozen=True)
class MiLoRA(PiSSA):
    """Train the bottom of the spectrum: PiSSA's update from the `rank` smallest singular triplets.

    Args:
        rank: singular triplets taken; all of a weight that has fewer, at the same s.
        alpha: numerator of the scale s = alpha / rank; None is `rank`, so that s = 1.
        dropout: probability of dropping an input of the branch in training.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "milora"
    paper: ClassVar[str] = "arXiv:2406.09044"
    summary: ClassVar[str] = "W + s (B A - B0 A0) from the smallest triplets; B and A train"
    learning_rate: ClassVar[float] = 3e-4
    which: ClassVar[Literal["top", "bottom"]] = "bottom"

    rank: int = 64
    dropout: float = 0.05

"""The parts of a model that training replaces by faster ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spectune.speed.attention import packed_attention
from spectune.speed.norms import fused_norms


@contextmanager
def training_parts(model: Any) -> Iterator[None]:
    """Within the context a model's attention and norms are those that it is trained with."""
    with packed_attention(model), fused_norms(model):
        yield

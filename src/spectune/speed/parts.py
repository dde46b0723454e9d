"""The parts of a model that training replaces by faster ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import nn

from spectune.speed.attention import packed_attention
from spectune.speed.norms import fused_norms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# whose `p` is a probability; in other modules it may be anything
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def training_parts(model: PreTrainedModel, dropout: bool = True) -> Iterator[None]:
    """Within the context a model's attention and norms are those that it is trained with.

    Args:
        model: the model.
        dropout: whether the model's own dropout stays; an adapter's does.
    """
    with packed_attention(model), fused_norms(model), nullcontext() if dropout else _without_dropout(model):
        yield


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is float and ("drop" in name or (name == "p" and isinstance(module, _DROPOUTS)))
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)

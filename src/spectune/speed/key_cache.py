"""Keys and values of a text that is gone on with, written into spare room instead of copied at every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE = 64  # tokens, at least; a quarter of what is there where that is more


def with_spare(tokens: int) -> int:
    """Return for how many tokens there is to be room where there are so many."""
    return tokens + max(_SPARE, tokens // 4)


class _Room:
    """A tensor (rows x heads x tokens x features) with room for more tokens behind those in use."""

    def __init__(self) -> None:
        self.all: Tensor | None = None
        self.used: Tensor | None = None

    def add(self, held: Tensor, new: Tensor) -> Tensor:
        """Return what is held with new tokens behind it.

        Args:
            held: what the last call returned, and its memory is written on; anything else is copied first.
            new: the tokens.
        """
        known = held.shape[-2] if held.numel() else 0
        count = known + new.shape[-2]
        if self.all is None or held is not self.used or count > self.all.shape[-2]:
            self.all = new.new_empty(*new.shape[:-2], with_spare(count), new.shape[-1])
            if known:
                self.all[..., :known, :] = held
        self.all[..., known:count, :] = new
        self.used = self.all[..., :count, :]
        return self.used


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, as transformers' own holds them but for the room behind them."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        self._rooms = _Room(), _Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        # what a gradient goes through, or a compiled graph holds, is written to by nobody
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._rooms
        held = cast("tuple[Tensor, Tensor]", (self.keys, self.values))  # which are there once it is initialized
        self.keys, self.values = found = keys.add(held[0], key_states), values.add(held[1], value_states)
        return found


def growing_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Return a cache for a model that goes on with texts; None where transformers should choose one.

    Layers that keep all tokens are written into spare room, those of a window or a state are transformers' own.
    """
    supports = getattr(model, "_supports_default_dynamic_cache", bool)  # what `generate` asks, in releases that have it
    if model.config.is_encoder_decoder or not supports() or "mamba" in type(model).__name__.lower():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

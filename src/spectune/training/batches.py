"""Batches without padding: examples end to end in one row, with logits only where the loss is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from spectune.training import attention
from spectune.training.data import Example

IGNORE = -100
PACKED_LIMIT = 8192  # tokens in a row; the attention mask of a packed row has their square


class Packer:
    """Collate examples for a causal language model.

    Where the model takes `logits_to_keep`, the examples lie end to end in one row: positions start anew with each,
    from which transformers builds a block-diagonal attention mask, and logits are computed at supervised positions
    only.  Otherwise they are padded on the right.

    Args:
        model: the model.
        pad: the token to pad with.
    """

    def __init__(self, model: Any, pad: int) -> None:
        parameters = inspect.signature(type(model).forward).parameters
        self._packs = {"logits_to_keep", "position_ids"} <= parameters.keys()
        self._config = model.config.get_text_config() if self._packs and "kwargs" in parameters else None
        self._pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the model's inputs, with `labels` shifted to the positions that predict them."""
        short = sum(len(e.tokens) for e in examples) <= PACKED_LIMIT
        return self._packed(examples) if self._packs and short else self._padded(examples)

    def _packed(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        tokens, positions, keep, labels = [], [], [], []
        for example in examples:
            start = len(tokens)
            tokens += example.tokens
            positions += range(len(example.tokens))
            learned = [i for i, s in enumerate(example.supervised) if s and i > 0]
            keep += [start + i - 1 for i in learned]
            labels += [example.tokens[i] for i in learned]
        batch = {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.tensor([positions]),
            "logits_to_keep": torch.tensor(keep),
            "labels": torch.tensor([labels]),
        }
        if self._config is not None and self._config._attn_implementation == attention.NAME:
            starts = [0, *accumulate(len(example.tokens) for example in examples)]
            batch["cu_seq_lens_q"] = torch.tensor(starts, dtype=torch.int32)  # the name that attention functions know
        return batch

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(e.tokens) for e in examples)
        ids = torch.full((len(examples), longest), self._pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for row, example in enumerate(examples):
            n = len(example.tokens)
            ids[row, :n], mask[row, :n] = torch.tensor(example.tokens), 1
            shifted = [t if s else IGNORE for t, s in zip(example.tokens[1:], example.supervised[1:], strict=True)]
            labels[row, : n - 1] = torch.tensor(shifted, dtype=labels.dtype)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

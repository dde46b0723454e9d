"""Batches without padding: examples end to end in one row, with logits only where the loss is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.model.routing import base_alone
from spectune.speed import attention
from spectune.speed.shapes import IGNORE, STEP
from spectune.training.data.encoding import Example
from spectune.training.data.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_LIMIT = 8192  # tokens in a row; the attention mask of a packed row has their square
_SEEN_LIMIT = 4 * PACKED_LIMIT  # tokens that a row's examples attend to, whose keys and values are gathered
_PROBE = 8  # tokens of each example that a model is asked with
_SAME = 1e-4  # of the largest logit; experts round a token by which others they get, nothing else should differ at all
_ALIKE = 0.05  # of the largest logit; products of other shapes round otherwise in 16 bits
_ASKED: WeakKeyDictionary[object, dict[tuple[str, str], bool]] = WeakKeyDictionary()  # by attention and question


class Packer:
    """Collate examples for a causal language model.

    Where the model takes `logits_to_keep`, the examples lie end to end in one row: positions start anew with each,
    from which transformers builds a block-diagonal attention mask, and logits are computed at supervised positions
    only.  Tokens that several examples begin with, such as a system prompt or the prompt of a pair, lie there once, and
    all of these attend to them.  Otherwise, and where the model does not keep the examples of a row apart, they are
    padded on the right.

    Args:
        model: the model.
        pad: the token to pad with.

    Attributes:
        packs: whether it lays examples end to end.
        shares: whether tokens that they begin with in common lie there once.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        parameters = inspect.signature(type(model).forward).parameters
        takes = {"logits_to_keep", "position_ids"} <= parameters.keys()
        self._config = model.config.get_text_config() if takes and "kwargs" in parameters else None
        # a CPU makes kernels of its own for each new shape of products in these dtypes, which takes time and memory
        self._rounds = takes and model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16)
        self._pad, self._dtype = pad, getattr(model, "dtype", None)
        self.packs = takes and self._keeps_apart(model)
        self.shares = self.packs and self._config is not None and self._attends_to_shared(model)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the model's inputs, with `labels` shifted to the positions that predict them."""
        if self.packs:
            layout = Layout(examples, self.shares)
            if layout.count <= PACKED_LIMIT and sum(layout.seen) <= _SEEN_LIMIT:
                return self._packed(examples, layout)
        return self._padded(examples)

    def _keeps_apart(self, model: PreTrainedModel) -> bool:
        """Whether another first example in a row leaves the logits of the second as they are.

        Attention under a block-diagonal mask does; what carries a state along the row does not, nor a model that makes
        no such mask.  The base is asked, in evaluation mode, since no list of architectures is complete.
        """

        def ask(first: list[int], other: list[int], second: list[int]) -> bool:
            # two different first examples, one second: whatever of the first reaches the second shows as a difference
            one, two = (self._said(model, [before, second], False) for before in (first, other))
            return _close(one, two, _SAME)

        return self._ask(model, "apart", ask)

    def _attends_to_shared(self, model: PreTrainedModel) -> bool:
        """Whether an example whose beginning lies in another one's rows gets the logits that it gets alone."""
        config = model.config.get_text_config()
        if config._attn_implementation not in ("eager", "sdpa", attention.NAME) or not attention.is_full(config):
            return False

        def ask(first: list[int], other: list[int], second: list[int]) -> bool:
            # Layout sorts examples, and the last of them is the one that is compared
            one, two = sorted((first + other, first + second))  # as they would lie
            try:
                shared = self._said(model, [one, two], True)
            except Exception:  # whatever a model raises that makes something else of a mask
                return False
            return _close(shared, self._said(model, [two], False), _ALIKE if model.dtype.itemsize < 4 else _SAME)

        return self._ask(model, "shared", ask)

    def _ask(self, model: PreTrainedModel, what: str, ask: Callable[..., bool]) -> bool:
        """Return the answer to a question about a model, put once for each attention that it has."""
        config = model.config.get_text_config()
        known = _ASKED.setdefault(model, {})
        key = str(config._attn_implementation), what
        if model.device.type == "meta":  # where there are no numbers to compare
            return True
        if key not in known:
            drawn = torch.randint(config.vocab_size, (3, _PROBE), generator=torch.Generator().manual_seed(0))
            known[key] = ask(*drawn.tolist())
        return known[key]

    def _said(self, model: PreTrainedModel, texts: Sequence[list[int]], share: bool) -> Tensor:
        """Return the base's last logits (tokens x words) for a row of examples."""
        examples = [Example(tokens, [True] * len(tokens)) for tokens in texts]
        packed = self._packed(examples, Layout(examples, share))
        inputs = {k: v.to(model.device) for k, v in packed.items() if k != "labels"}
        with base_alone(model), torch.no_grad():
            return model(**inputs, use_cache=False).logits[0, 1 - _PROBE :].float()

    def _packed(self, examples: Sequence[Example], layout: Layout) -> dict[str, Tensor]:
        how = "" if self._config is None else self._config._attn_implementation
        tokens, positions = [], []
        for index, own, seen in zip(layout.order, layout.own, layout.seen, strict=True):
            tokens += examples[index].tokens[seen - own :]
            positions += range(seen - own, seen)
        keep, labels = [], []
        for example, place in zip(examples, layout.rows, strict=True):
            learned = [i for i, s in enumerate(example.supervised) if s and i > 0]
            # the logits of a token are those at the row before it, which may be another example's where the beginning
            # is shared
            keep += [place[i - 1] for i in learned]
            labels += [example.tokens[i] for i in learned]
        batch = {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.tensor([positions]),
            "logits_to_keep": torch.tensor(keep),
            "labels": torch.tensor([labels]),
        }
        shared = layout.own != layout.seen
        if shared:
            batch["cu_seq_lens_k"] = _ends(layout.seen)  # the name that attention functions know
        if how == attention.NAME:
            batch["cu_seq_lens_q"] = _ends(layout.own)
            if shared:
                batch["context_rows"] = torch.tensor([row for index in layout.order for row in layout.rows[index]])
            # rows that belong to no example, so that lengths come in steps: see `_rounds`; short rows would mostly be
            # filling
            extra = -len(tokens) % STEP if self._rounds and len(tokens) > 16 * STEP else 0
            for key in ("input_ids", "position_ids"):
                batch[key] = F.pad(batch[key], (0, extra))
        elif shared:
            batch["attention_mask"] = layout.mask(self._dtype if how == "eager" else None)
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


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _close(one: Tensor, other: Tensor, share: float) -> bool:
    return bool((one - other).abs().max() <= share * one.abs().max())

"""Attention within each example of a packed row, at the cost of the examples and not of the row.

With a block-diagonal mask, attention on a CPU computes the whole square of the row.  Here each example attends to
itself in a call of its own, and where a model in bf16 learns, in fp32.  An example whose first tokens are another's has
rows for the rest alone, which attend to the shared ones as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spectune.private import flash_attention, flash_attention_backward, sdp_choice
from spectune.speed.autograd import Context
from spectune.speed.recompute_cache import current_cache, learns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "spectune_packed"
_PROCESSOR = ("cpu", "meta")  # what stands on the meta device is counted as a processor's
_SHORT = 512  # tokens; the backward pass of such attention in bf16 takes a CPU up to three times as long as in fp32


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    context_rows: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention (1, n, heads, d), each example of a packed row by itself; without lengths as usual.

    Args:
        module: the model's attention layer.
        query, key, value: (1, heads, n, d), with fewer heads in the last two where they share.
        attention_mask: used only without lengths.
        dropout: of the probabilities.
        scaling: of the scores.
        cu_seq_lens_q: (examples + 1), where the rows of each example begin, and the end.
        cu_seq_lens_k: the same of what each attends to, if that is more.
        context_rows: what each attends to, one example behind the other; its own rows are its last ones.
        kwargs: what else models pass.
    """
    spans = None
    if cu_seq_lens_q is not None and len(query) == 1:
        spans = _Spans(cu_seq_lens_q, cu_seq_lens_k, context_rows)
    dtype = query.dtype
    low = dtype in (torch.bfloat16, torch.float16) and query.device.type in _PROCESSOR
    if low and learns() and max(spans.seen if spans else query.shape[2:3]) <= _SHORT:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    if spans is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    else:
        out = _each(query, key, value, spans, dropout, scaling)
    return out.to(dtype), None


class _How(TypedDict):
    """How the rows of one example see what they attend to, in the words of PyTorch's attention."""

    attn_mask: Tensor | None
    is_causal: bool


class _Spans:
    """How many rows each example of a packed row has, and how many it attends to, which may be those of others too."""

    def __init__(self, own: Tensor, seen: Tensor | None, rows: Tensor | None) -> None:
        self.own: list[int] = own.diff().tolist()
        self.seen: list[int] = self.own if seen is None else seen.diff().tolist()
        self.rows = rows

    def parts(self, own: Sequence[Tensor], seen: Sequence[Tensor]) -> Iterator[tuple[tuple[Tensor, ...], _How]]:
        """Return for each example its parts of tensors, and how its rows see those that they attend to.

        Args:
            own: tensors (1, heads, rows, ...) of its own rows.
            seen: the same of what these attend to.
        """
        split = (*(t.split(self.own, 2) for t in own), *(t.split(self.seen, 2) for t in seen))
        most = max((n for m, n in zip(self.own, self.seen, strict=True) if m < n), default=0)
        causal = own[0].new_full((most, most), -torch.inf).triu_(1)
        for m, n, *parts in zip(self.own, self.seen, *split, strict=True):
            mask = causal[n - m : n, :n] if m < n else None
            yield tuple(parts), {"attn_mask": mask, "is_causal": mask is None}


def _each(query: Tensor, key: Tensor, value: Tensor, spans: _Spans, dropout: float, scaling: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    count = sum(spans.own)
    # rows that fill the batch up belong to no example; SDPA would give them an average of everything
    rest = query.shape[2] - count  # padding, which attends to nothing
    query = query[:, :, :count]
    key, value = (t[:, :, :count] if spans.rows is None else t.index_select(2, spans.rows) for t in (key, value))
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if not dropout and _is_flash(query, key, value, scaling):
        out: Tensor = _Kept.apply(query, key, value, spans, scaling)
    else:
        attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
        each = [attend(q, k, v, **how) for (q, k, v), how in spans.parts((query,), (key, value))]
        out = torch.cat(each, 2)
    return (F.pad(out, (0, 0, 0, rest)) if rest else out).transpose(1, 2).contiguous()


def _is_flash(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> bool:
    if flash_attention is None or flash_attention_backward is None or sdp_choice is None:
        return False
    choice = sdp_choice(query, key, value, None, 0.0, True, scale=scaling)
    return choice == SDPBackend.FLASH_ATTENTION.value


class _KeptContext(Context):
    spans: _Spans
    scaling: float | None


class _Kept(torch.autograd.Function):
    """Attention of each example, which a checkpointed region keeps as it does products; no mask outlives a call."""

    @staticmethod
    def forward(
        ctx: _KeptContext, query: Tensor, key: Tensor, value: Tensor, spans: _Spans, scaling: float | None
    ) -> Tensor:
        cache = current_cache()
        known = cache.recall_whole() if cache is not None else None
        if known is None:
            assert flash_attention is not None  # or `_is_flash` had said no
            parts = spans.parts((query,), (key, value))
            each = [flash_attention(*part, scale=scaling, **how) for part, how in parts]
            known = torch.cat([out for out, _ in each], 2), torch.cat([sums for _, sums in each], 2)
        if cache is not None:
            cache.keep(*known, looked_at=True)
        ctx.save_for_backward(query, key, value, *known)
        ctx.spans, ctx.scaling = spans, scaling
        return known[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: _KeptContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        through = flash_attention_backward
        assert through is not None
        query, key, value, out, sums = ctx.saved_tensors
        parts = ctx.spans.parts((grads[0], query, out, sums), (key, value))
        each = [through(g, q, k, v, o, s, 0.0, scale=ctx.scaling, **how) for (g, q, o, s, k, v), how in parts]
        return *(torch.cat(of, 2) for of in zip(*each, strict=True)), None, None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def is_full(config: PreTrainedConfig) -> bool:
    """Whether every layer of a text model attends to all that its mask allows, without windows or biases of its own."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # the latter GPT-Neo's
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    full = set(kinds) <= {"full_attention", "global"} if kinds else not windowed
    return full and not getattr(config, "alibi", False)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a causal language model on a CPU attends to each example of a packed row by itself.

    Where that would not be the same, with sliding windows or another attention than PyTorch's, nothing changes, nor in
    models that ask for attention by another name than transformers' (Falcon).
    """
    config = model.config.get_text_config()
    before = getattr(config, "_attn_implementation", None)  # the public name is the model's, and for setting it only
    asks = getattr(model, "_supports_attention_backend", False)
    if before == "sdpa" and asks and is_full(config) and model.device.type in _PROCESSOR:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        if before is not None:
            config._attn_implementation = before

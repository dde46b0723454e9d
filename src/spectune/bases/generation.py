"""Replies from a model: chat prompts, the limit of its context, streaming."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from packaging.version import Version
from torch import Tensor

from spectune.bases.prompts import Message, prompt_tokens, stop_tokens
from spectune.bases.tokens import padding
from spectune.errors import SpectuneError
from spectune.model.fusing import fused_where_it_pays
from spectune.speed.key_cache import growing_cache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


_RENAMED = Version(version("transformers")) >= Version("5.24")
_CACHE_KEYS = ("cache", "past_key_values") if _RENAMED else ("past_key_values", "cache")


class Reply(NamedTuple):
    """A reply, as text and as tokens up to the first end of text."""

    text: str
    tokens: list[int]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return rows of tokens (rows, longest), padded on the left, and the mask that is 1 at tokens."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def last_logits(model: PreTrainedModel, count: int = 1) -> dict[str, Tensor]:
    """Return the argument that has a model make logits at the last positions alone, where it takes one.

    A tensor, since models cut a number of positions from all as a view, which PyTorch multiplies by a frozen output
    embedding row by row, on a processor with a copy of it for each: 8 rows take a hundred times as long in bf16.
    """
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": torch.arange(-count, 0, device=model.device)} if takes else {}


def cache_key(model: PreTrainedModel) -> str:
    """Return the name of the argument that gives a model its cache: that of transformers, or the other."""
    taken = inspect.signature(model.forward).parameters
    return next((key for key in _CACHE_KEYS if key in taken), _CACHE_KEYS[0])


def kept_cache(output: Any) -> Cache:
    """Return the cache of a model's output, by either name."""
    return cast("Cache", output.cache if hasattr(output, "cache") else output.past_key_values)


def check_generates(model: PreTrainedModel) -> None:
    """Raise unless a model goes on with a text.

    Raises:
        SpectuneError: it does not.
    """
    if not model.can_generate():
        raise SpectuneError(f"{type(model).__name__} does not generate text; a classifier answers `spectune classify`")


def _check_length(rows: Sequence[Sequence[int]], context: int | None) -> None:
    for row in rows:
        if context is not None and len(row) + 1 > context:
            raise SpectuneError(
                f"the prompt has {len(row)} tokens and the model's context holds {context}; shorten the prompt"
            )
        if not row:
            raise SpectuneError("the prompt has no token, and a reply must have one to begin with")


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    raw: bool = False,
    streamer: object = None,
    fused: bool = True,
) -> list[Reply]:
    """Return a reply to each prompt, all in one batch.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        prompts: texts or conversations.
        max_new_tokens: length limit of a reply.
        temperature: 0 is greedy.
        top_p: nucleus sampling, where temperature is above 0.
        seed: of the sampling.
        raw: continue texts as they are, without a chat template.
        streamer: a transformers streamer, for a single prompt.
        fused: answer from merged weights beside the base's, where that is faster (`spectune.fused`).

    Raises:
        SpectuneError: a prompt longer than the model's context, or without a token.
    """
    check_generates(model)
    rows = [prompt_tokens(tokenizer, prompt, raw=raw) for prompt in prompts]
    context = getattr(model.config, "max_position_embeddings", None)
    _check_length(rows, context)
    longest, pad = max(map(len, rows)), padding(tokenizer)
    ends = stop_tokens(model, tokenizer)
    ids, mask = left_padded(rows, pad, model.device)
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - longest)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    cache = growing_cache(model)
    with fused_where_it_pays(model, max_new_tokens * (1 + len(rows) // 8), allowed=fused):
        out = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends or None,
            streamer=streamer,
            **({} if cache is None else {cache_key(model): cache}),
            **last_logits(model),
            **sampling,
        )
    replies = []
    for row in out.tolist():
        tokens = row[longest:]
        end = next((i for i, token in enumerate(tokens) if token == pad or token in ends), len(tokens))
        tokens = tokens[:end]
        replies.append(Reply(cast(str, tokenizer.decode(tokens, skip_special_tokens=True)).strip(), tokens))
    return replies

"""Completions sampled from a model, and the forward pass that computes logits at their tokens alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from spectune.bases.generation import cache_key, last_logits, left_padded
from spectune.model.fusing import fused_where_it_pays
from spectune.speed.key_cache import growing_cache
from spectune.training.data.packing import Packer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int]


class Rollout(NamedTuple):
    """Several completions of each prompt, as the inputs of one forward pass.

    Args:
        inputs: the model's; its logits (rows, kept, vocabulary) are those at `logits_to_keep`.
        rows, kept: for each completion token, in the order of the completions, where its prediction is.
        tokens: the completion tokens.
        owner: for each token, which completion it belongs to.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    kept: Tensor
    tokens: Tensor
    owner: Tensor


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the completions of a prompt can lie behind it in one row, so that the prompt is computed once.

    It takes what sharing beginnings in a packed row does: full attention, which goes by a mask of our own, and layers
    that carry nothing from one completion to the next.
    """
    return Packer(model, 0).shares


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    samples: int,
    *,
    max_new_tokens: int,
    temperature: float,
    pad: int,
    ends: Sequence[int],
    fused: bool = True,
) -> list[list[list[int]]]:
    """Return completions of each prompt, drawn from softmax(logits / temperature) by torch's generator.

    Args:
        model: a causal language model; it samples in evaluation mode.
        prompts: token ids.
        samples: completions of each prompt.
        max_new_tokens: length limit of a completion.
        temperature: 0 is greedy.
        pad: the token to pad with.
        ends: tokens that end a completion; the one that does is its last token.
        fused: sample from merged weights beside the base's, where that is faster (`spectune.fused`).
    """
    training = model.training
    model.eval()
    ids, mask = left_padded(prompts, pad, model.device)
    try:
        with fused_where_it_pays(model, max_new_tokens * (1 + len(prompts) * samples // 8), allowed=fused):
            go_on = _continued if shares_prompts(model) else _generated
            found = go_on(model, ids, mask, _Drawing(samples, max_new_tokens, temperature, pad, ends))
    finally:
        model.train(training)
    return [found[i : i + samples] for i in range(0, len(found), samples)]


class _Drawing(NamedTuple):
    """What `sample` was asked for."""

    samples: int
    max_new_tokens: int
    temperature: float
    pad: int
    ends: Sequence[int]


def _continued(model: PreTrainedModel, ids: Tensor, mask: Tensor, asked: _Drawing) -> list[list[int]]:
    """Go on with prompts that are computed once each, their keys and values copied for the samples.

    `generate` would compute them for each, and a row that has ended until the last one has.
    """
    cache = growing_cache(model) or DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {cache_key(model): cache, "use_cache": True, **last_logits(model)}
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **given).logits[:, -1]
    cache.batch_repeat_interleave(asked.samples)
    logits, mask = (t.repeat_interleave(asked.samples, 0) for t in (logits, mask))
    found: list[list[int]] = [[] for _ in range(len(logits))]
    rows, stop = list(range(len(found))), frozenset(asked.ends)
    for left in reversed(range(asked.max_new_tokens)):
        tokens = _drawn(logits, asked.temperature)
        chosen = tokens[:, 0].tolist()
        for row, token in zip(rows, chosen, strict=True):
            found[row].append(token)
        kept = [i for i, token in enumerate(chosen) if token not in stop]
        if not left or not kept:
            break
        mask = F.pad(mask, (0, 1), value=1)
        if len(kept) < len(rows):
            index = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(index)
            rows, tokens, mask = [rows[i] for i in kept], tokens[index], mask[index]
        at = mask.sum(1, keepdim=True) - 1
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=at, **given).logits[:, -1]
    return found


def _generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, asked: _Drawing) -> list[list[int]]:
    """Go on with prompts as transformers does, for models whose rows or states are other ones'."""

    class Drawn(LogitsProcessor):
        """Leave one token of each row, which is then the one with the largest logit."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -math.inf).scatter_(-1, _drawn(scores, asked.temperature), 0.0)

    habits = model.generation_config
    # a model's own top_k or penalty would make it another distribution
    model.generation_config = GenerationConfig()
    try:
        out = cast(Any, model).generate(
            input_ids=ids.repeat_interleave(asked.samples, 0),
            attention_mask=mask.repeat_interleave(asked.samples, 0),
            max_new_tokens=asked.max_new_tokens,
            pad_token_id=asked.pad,
            eos_token_id=list(asked.ends) or None,
            do_sample=False,
            logits_processor=LogitsProcessorList([Drawn()] if asked.temperature > 0 else []),
            **last_logits(model),
        )
    finally:
        model.generation_config = habits
    return [_until_end(row[ids.shape[1] :], asked.ends) for row in out.tolist()]


_BLOCK = 256  # tokens, of which one sum is taken before one of them is drawn


def _drawn(logits: Tensor, temperature: float) -> Tensor:
    """Return a token of each row (rows, 1), drawn from softmax(logits / temperature), or the likeliest one.

    First a block of tokens is drawn and then one of it: what PyTorch draws takes a random number for each token of the
    vocabulary, a quarter of a small model's time.

    Args:
        logits: (rows, vocabulary).
        temperature: 0 is greedy.
    """
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    # the sums of blocks say what a weight is of the whole; in place, since a vocabulary's floats are memory to clear
    p = logits.to(torch.float32, copy=True)
    p.sub_(p.amax(-1, keepdim=True)).div_(temperature).exp_()
    if rest := -p.shape[-1] % _BLOCK:
        p = F.pad(p, (0, rest))
    blocks = p.unflatten(-1, (-1, _BLOCK))
    block = _one_of(blocks.sum(-1))
    return block * _BLOCK + _one_of(blocks.take_along_dim(block[..., None], 1)[:, 0])


def _one_of(weights: Tensor) -> Tensor:
    """Return a place in each row (rows, 1), drawn with probabilities in proportion to the weights (rows, n)."""
    until = weights.cumsum(-1, dtype=torch.float32 if weights.device.type == "mps" else torch.float64)
    place = torch.rand(len(until), 1, dtype=until.dtype, device=until.device) * until[:, -1:]
    return torch.searchsorted(until, place, right=True).clamp_(max=weights.shape[-1] - 1)


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def lay_out(
    model: PreTrainedModel, prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], pad: int
) -> Rollout:
    """Return the forward pass for completions of prompts.

    Where `shares_prompts` a row is a prompt with all its completions behind it: each attends to the prompt and to
    itself, and its positions go on from the prompt's.  Otherwise a row is a prompt with one completion.

    Args:
        model: the model.
        prompts: token ids.
        completions: for each prompt the same number of completions, none empty.
        pad: the token to pad with.
    """
    if not (shared := shares_prompts(model)):
        prompts = [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group]
        completions = [[completion] for group in completions for completion in group]
    count, longest = len(completions[0]), max(len(c) for group in completions for c in group)
    ids, valid = left_padded(prompts, pad, model.device)
    start = ids.shape[1]
    tokens = torch.full((len(prompts), count, longest), pad, device=ids.device)
    lengths = torch.tensor([[len(c) for c in group] for group in completions], device=ids.device)
    for row, group in enumerate(completions):
        for j, completion in enumerate(group):
            tokens[row, j, : len(completion)] = torch.tensor(completion, device=ids.device)
    real = torch.arange(longest, device=ids.device) < lengths[..., None]
    prompt_positions = (valid.cumsum(1) - 1).clamp(min=0)
    own = valid.sum(1)[:, None, None] + torch.arange(longest, device=ids.device)
    positions = torch.cat([prompt_positions, own.expand_as(tokens).flatten(1)], 1)
    valid = torch.cat([valid, real.flatten(1).long()], 1)
    # the first token of every completion is predicted at the prompt's end, the others behind the one before
    blocks = start + torch.arange(count * longest, device=ids.device).view(count, longest)
    keep = torch.cat([torch.tensor([start - 1], device=ids.device), blocks[:, :-1].flatten()])
    inputs = {
        "input_ids": torch.cat([ids, tokens.flatten(1)], 1),
        "position_ids": positions,
        "attention_mask": _prefix_mask(valid, start, longest, model.dtype) if shared else valid,
        "logits_to_keep": keep,
    }
    rows, group, step = real.nonzero(as_tuple=True)
    # where the logits of a completion's token are among those that were kept: the prompt's last, and then for each
    # completion all but its last
    kept = torch.where(step == 0, 0, 1 + group * (longest - 1) + step - 1)
    return Rollout(inputs, rows, kept, tokens[real], rows * count + group)


def _prefix_mask(valid: Tensor, start: int, longest: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (rows, 1, length, length) of completions of one length behind a prompt."""
    length = valid.shape[1]
    place = torch.arange(length, device=valid.device)
    block = torch.where(place < start, -1, (place - start) // longest)
    sees = (place[:, None] >= place) & ((block == -1) | (block[:, None] == block))
    # padding sees itself, or its softmax would be over nothing
    seen = (sees & valid.bool()[:, None, :]) | torch.eye(length, dtype=torch.bool, device=valid.device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=valid.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def completion_logits(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Return the logits (tokens, vocabulary) that predict each completion token."""
    inputs = dict(rollout.inputs)
    parameters = inspect.signature(type(getattr(model, "module", model)).forward).parameters
    keep = inputs["logits_to_keep"]
    takes = "logits_to_keep" in parameters
    if not takes:
        inputs.pop("logits_to_keep")
    if "position_ids" not in parameters:
        inputs.pop("position_ids")
    logits = model(**inputs, use_cache=False).logits
    logits = logits if takes else logits[:, keep]
    return logits[rollout.rows, rollout.kept]

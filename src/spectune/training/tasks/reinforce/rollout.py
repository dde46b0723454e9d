"""Completions sampled from a model, and the forward pass that computes logits at their tokens alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from spectune.bases.generation import last_logits, left_padded
from spectune.model.fusing import fused_where_it_pays
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
    training, habits = model.training, model.generation_config
    model.eval()
    ids, mask = left_padded(prompts, pad, model.device)
    cache: dict[str, object] = {}
    with fused_where_it_pays(model, max_new_tokens * (1 + len(prompts) * samples // 8), allowed=fused):
        if samples > 1 and ids.shape[1] > 1 and shares_prompts(model):
            # the prompt is computed once, and its keys and values copied for the samples: `generate` would compute it
            # for each
            past = DynamicCache(config=model.config)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                **last_logits(model),
            )
            past.batch_repeat_interleave(samples)
            cache = {"past_key_values": past}
        drawn = {"logits_processor": LogitsProcessorList([_Drawn(temperature)])} if temperature > 0 else {}
        # a model's own top_k or penalty would make it another distribution
        model.generation_config = GenerationConfig()
        try:
            out = cast(Any, model).generate(
                input_ids=ids.repeat_interleave(samples, 0),
                attention_mask=mask.repeat_interleave(samples, 0),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=list(ends) or None,
                do_sample=False,  # the largest logit, which is that of what was drawn
                **drawn,
                **last_logits(model),
                **cache,
            )
        finally:
            model.generation_config = habits
            model.train(training)
    cut = [_until_end(row[ids.shape[1] :], ends) for row in out.tolist()]
    return [cut[i : i + samples] for i in range(0, len(cut), samples)]


_BLOCK = 256  # tokens, of which one sum is taken before one of them is drawn


class _Drawn:
    """Leave one token of each row, drawn from softmax(logits / temperature): first a block of them, then one of it.

    What PyTorch draws takes a random number for each token of the vocabulary, a quarter of a small model's time.

    Args:
        temperature: above 0.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p = torch.softmax(scores.float() / self._temperature, -1)
        blocks = F.pad(p, (0, -p.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
        block = _one_of(blocks.sum(-1))
        token = block * _BLOCK + _one_of(blocks.take_along_dim(block[..., None], 1)[:, 0])
        return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)


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

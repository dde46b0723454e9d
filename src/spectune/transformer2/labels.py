"""Labelling a prompt by the likelihood of each label, with the bias between labels taken out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.bases.generation import cache_key, kept_cache, last_logits
from spectune.bases.prompts import prompt_tokens
from spectune.errors import SpectuneError
from spectune.transformer2.library import NONE, Library

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

CONTENT_FREE = ("N/A", "...", "")  # prompts that are for nothing (arXiv 2102.09690)
_TOKENS = 1 << 14  # tokens that lie in caches at once, over prompts and labels
_ROWS = 16  # prompts labelled at once, at most
_OPENING = "The best skill for this message is:"


def labelling_prompt(library: Library, prompt: str, descriptions: bool = True) -> str:
    """Return the question that asks which of the library's adapters, or "none", a prompt is for.

    Args:
        library: the library.
        prompt: what the user asked.
        descriptions: tell what each adapter is for; one that was trained to label need not be told.
    """
    skills = ""
    if descriptions:
        lines = [f"- {r.name}: {r.description or r.name}" for r in library.records]
        skills = "\n".join(["Skills:", *lines, f"- {NONE}: anything else", "", ""])
    return f"{skills}Which skill is this message for? Answer with its name only.\n\nMessage: {prompt}"


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each label as the answer would give it."""
    return [tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in labels]


def opened(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the tokens of a labelling question, up to where the label follows."""
    tokens = prompt_tokens(tokenizer, question)
    return tokens + tokenizer(_OPENING, add_special_tokens=False)["input_ids"]


def answer_text(label: str) -> str:
    """Return the reply that gives a label."""
    return f"{_OPENING} {label}"


@torch.inference_mode()
def label_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[Sequence[int]], labels: Sequence[str]
) -> Tensor:
    """Return log p(label | prefix) of every label, (prefixes x labels), float32 on the CPU.

    A prefix is read once; the labels go on from its cache.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prefixes: tokens of the labelling questions.
        labels: the labels.

    Raises:
        SpectuneError: a question that is longer than the model's context.
    """
    answers = label_tokens(tokenizer, labels)
    most, longest = max(map(len, answers)), max(map(len, prefixes))
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest + most > context:
        raise SpectuneError(
            f"the labelling question has {longest} tokens and the model's context holds {context}: shorten the "
            "descriptions or the prompt, or use the classifier strategy, which does not list the adapters"
        )
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    scores = torch.zeros(len(prefixes), len(labels))
    step = max(1, min(_ROWS, _TOKENS // (longest * len(labels))))
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        scores[rows] = _scores(model, [prefixes[i] for i in rows], answers)
    return scores


def _scores(model: PreTrainedModel, prefixes: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    device, longest, most = model.device, max(map(len, prefixes)), max(map(len, answers))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prefixes], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prefixes], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **last_logits(model))
    first = F.log_softmax(out.logits[:, -1].float(), dim=-1)
    total = torch.stack([first[:, answer[0]] for answer in answers], dim=1)
    if most == 1:
        return total.cpu()
    step = max(1, _TOKENS // (longest * len(prefixes)))
    parts = [answers[start : start + step] for start in range(0, len(answers), step)]
    rest = []
    for i, part in enumerate(parts):
        # the last part may have the cache itself, which would otherwise be there twice
        cache = kept_cache(out) if i == len(parts) - 1 else copy.deepcopy(kept_cache(out))
        rest.append(_rest(model, cache, mask, part))
    return (total + torch.cat(rest, dim=1)).cpu()


def _rest(model: PreTrainedModel, cache: Cache, mask: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-likelihood of all but the first token of each answer, (prefixes x answers), behind a cache."""
    (rows, count), device = (len(mask), len(answers)), mask.device
    # one token at least is given, or the model would be called with nothing
    most = max(2, *map(len, answers))
    cache.batch_repeat_interleave(count)
    given = torch.tensor([[*a[:-1], *[0] * (most - len(a))] for a in answers], device=device)
    there = torch.tensor([[1] * (len(a) - 1) + [0] * (most - len(a)) for a in answers], device=device)
    following = torch.tensor([[*a[1:], *[0] * (most - len(a))] for a in answers], device=device)
    given, there, following = (t.repeat(rows, 1) for t in (given, there, following))
    # positions go on behind each prefix as it is without its padding
    lengths = mask.sum(1).repeat_interleave(count)
    out = model(
        input_ids=given,
        attention_mask=torch.cat([mask.repeat_interleave(count, dim=0), there], dim=1),
        position_ids=lengths[:, None] + torch.arange(most - 1, device=device),
        **{cache_key(model): cache},
        use_cache=True,
    )
    log = F.log_softmax(out.logits.float(), dim=-1).gather(-1, following[..., None])[..., 0]
    return (log * there).sum(1).view(rows, count)


def prompt_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    library: Library,
    prompts: Sequence[str],
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return how much likelier each prompt makes every label than a prompt without content does.

    log p(label | question) - log mean_c p(label | question with the content-free prompt c): this takes out what the
    model likes to say anyway, and with it the length of a label (arXiv 2102.09690, 2104.08315).

    Args:
        model, tokenizer: the base alone.
        library: the library, whose names and "none" are the labels.
        prompts: what users asked.
        bias: the second part, where it is known.

    Returns:
        The scores (prompts x labels) and the bias (labels).
    """
    labels = [*library.names, NONE]

    def raw(texts: Sequence[str]) -> Tensor:
        prefixes = [opened(tokenizer, labelling_prompt(library, text)) for text in texts]
        return label_scores(model, tokenizer, prefixes, labels)

    if bias is None:
        bias = raw(CONTENT_FREE).logsumexp(0) - torch.tensor(float(len(CONTENT_FREE))).log()
    return raw(prompts) - bias, bias

"""Examples of a task, and how likely a population of mixtures makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.bases.generation import last_logits
from spectune.bases.prompts import Message, text_of
from spectune.errors import SpectuneError
from spectune.training.data.encoding import Example, encode_one
from spectune.training.data.records import Record
from spectune.transformer2.pool import Mixture, Pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 1 << 15  # tokens in a forward pass of the population
_LOGITS = 1 << 28  # logits that it holds: 512 MiB in bf16


class Shot(NamedTuple):
    """One example of a task.

    Args:
        record: as it was given.
        prompt: the messages, or the text, before the completion.
        completion: the text that is wanted.
        example: its tokens, and which of them the completion is.
    """

    record: Record
    prompt: str | Sequence[Message]
    completion: str
    example: Example

    @property
    def given(self) -> str | Sequence[Message]:
        """The prompt in the record's own form, as a reward has it in training: text, or messages."""
        return self.prompt if self.record.get("messages") else self.record["prompt"]


def as_shot(record: Record, tokenizer: PreTrainedTokenizerBase) -> Shot:
    """Return a record as a shot; where the tokenizer has a chat template a text prompt is a user's turn.

    Raises:
        SpectuneError: a record without a prompt or without a completion.
    """
    if record.get("messages"):
        turns = list(record["messages"])
        prompt: Any = turns[:-1]
        wrong = len(turns) < 2 or turns[-1].get("role") != "assistant"
        completion = "" if wrong else text_of(turns[-1])
    else:
        prompt, completion = record.get("prompt"), record.get("completion") or ""
        if isinstance(completion, list):
            completion = text_of(completion[-1])
        wrong = not prompt or not completion
        if not wrong and isinstance(prompt, str) and getattr(tokenizer, "chat_template", None):
            prompt = [{"role": "user", "content": prompt}]
    if wrong:
        raise SpectuneError(
            f"a shot needs a prompt and the completion that is wanted, and this lacks one: {record!r:.80}"
        )
    if isinstance(prompt, str):
        return Shot(record, prompt, completion, encode_one({"prompt": prompt, "completion": completion}, tokenizer))
    encoded = encode_one({"messages": [*prompt, {"role": "assistant", "content": completion}]}, tokenizer)
    last = len(prompt_part(encoded))
    supervised = [learned and i >= last for i, learned in enumerate(encoded.supervised)]
    return Shot(record, prompt, completion, Example(encoded.tokens, supervised))


def prompt_part(example: Example) -> list[int]:
    """Return the tokens before an example's last supervised stretch."""
    end = max(i for i, learned in enumerate(example.supervised) if learned)
    while end > 0 and example.supervised[end - 1]:
        end -= 1
    return example.tokens[:end]


@torch.inference_mode()
def population_likelihood(pool: Pool, mixtures: Sequence[Mixture], shots: Sequence[Shot]) -> Tensor:
    """Return for each mixture the mean over shots of the completion's mean log-likelihood a token, (mixtures).

    All mixtures answer in one batch, each in rows of its own; shots of like length go together, and as many at once as
    memory is meant for.
    """
    total = torch.zeros(len(mixtures))
    for part in batches(shots, len(mixtures), pool.model.config.vocab_size):
        total += mean_likelihood(pool, mixtures, part).sum(1).cpu()
    return total / len(shots)


def batches(shots: Sequence[Shot], times: int, vocabulary: int) -> Iterator[list[Shot]]:
    """Yield shots of like length, as many as may be in a forward pass `times` each."""
    batch: list[Shot] = []
    for shot in sorted(shots, key=lambda s: len(s.example.tokens)):
        rows, learned = times * (len(batch) + 1), max(sum(s.example.supervised) for s in [*batch, shot])
        if batch and (rows * len(shot.example.tokens) > TOKENS or rows * learned * vocabulary > _LOGITS):
            yield batch
            batch = []
        batch.append(shot)
    yield batch


def mean_likelihood(pool: Pool, mixtures: Sequence[Mixture], shots: Sequence[Shot]) -> Tensor:
    """Return the mean log-likelihood of a completion's token, (mixtures x shots)."""
    examples = [shot.example for shot in shots]
    longest = max(len(e.tokens) for e in examples)
    pads = [longest - len(e.tokens) for e in examples]
    device = pool.model.device
    ids = torch.tensor([[0] * pad + e.tokens for pad, e in zip(pads, examples, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * len(e.tokens) for pad, e in zip(pads, examples, strict=True)], device=device)
    learned = torch.tensor([[False] * pad + e.supervised for pad, e in zip(pads, examples, strict=True)], device=device)
    kept = longest - int(learned.any(0).nonzero()[0])  # positions from the first that any completion has
    n = len(mixtures)
    with pool.route([mixture for mixture in mixtures for _ in shots]):
        logits = pool.model(
            input_ids=ids.repeat(n, 1),
            attention_mask=mask.repeat(n, 1),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).repeat(n, 1),
            use_cache=False,
            **last_logits(pool.model, kept + 1),
        ).logits[:, -kept - 1 : -1]
    targets, counted = ids[:, -kept:].repeat(n, 1), learned[:, -kept:].repeat(n, 1)
    pairs = zip(logits, targets, strict=True)  # row by row, since logits in float32 are the largest thing here
    log = torch.stack([-F.cross_entropy(row.float(), target, reduction="none") for row, target in pairs])
    return ((log * counted).sum(1) / counted.sum(1)).view(n, len(shots))

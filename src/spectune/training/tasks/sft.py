"""Supervised fine-tuning: the next token of completions, assistant turns or whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from spectune.bases.prompts import stop_tokens
from spectune.bases.tokens import padding
from spectune.errors import SpectuneError
from spectune.speed.loss import cross_entropy_sum
from spectune.speed.shapes import IGNORE
from spectune.training.data.encoding import Encoded, Encoder, Example
from spectune.training.data.messages import kinds_of, message_problem
from spectune.training.data.packing import Packer
from spectune.training.data.records import Record, form
from spectune.training.data.store import stored
from spectune.training.options import SftOptions, TaskOptions
from spectune.training.tasks.base import Collator, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sft(Task):
    """Mean cross-entropy over supervised tokens."""

    options_type: ClassVar[type[TaskOptions]] = SftOptions
    forms: ClassVar[str] = "'messages', 'prompt' and 'completion', or 'text'"
    unit = "token"

    def problem(self, record: Record) -> str | None:
        kind = form(record)
        if kind is None:
            there = [repr(key) for key, value in record.items() if value is not None]
            return f"has the keys {', '.join(there) or 'none'}; it needs {self.forms}"
        if kind == "messages":
            return message_problem(record["messages"])
        if kind == "text":
            return None if isinstance(record["text"], str) else f"text must be a string, and is {record['text']!r:.40}"
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return None
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            kinds = kinds_of(record, ("prompt", "completion"))
            return f"prompt and completion must both be text, or both be lists of messages; {kinds}"
        problem = message_problem([*prompt, *completion], len(prompt))
        return None if problem is None else f"completion: {problem}"

    def encode(
        self, records: Sequence[Record], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Encoded:
        return encode(records, tokenizer, limit, self.config.completion_only, stop_tokens(model, tokenizer))

    def examples(self, record: Record, encoder: Encoder) -> list[Example]:
        return encoder.examples(record, everything=not self.config.completion_only)

    def collator(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        return Packer(model, padding(tokenizer))

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = inputs.pop("labels")
        loss = cross_entropy_sum(model, inputs, labels)
        return {"loss": loss, "items": (labels != IGNORE).sum()}


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    completion_only: bool = True,
    ends: Sequence[int] = (),
) -> Encoded:
    """Tokenize records; the loss is on assistant turns, completions, or all of a text.

    Args:
        records: in one of the forms of `Sft`.
        tokenizer: with a chat template, where there are messages.
        max_length: tokens kept of each example.
        completion_only: False puts the loss on every token.
        ends: tokens that end the model's generation.

    Raises:
        SpectuneError: messages without a chat template or that it refuses, or nothing left to learn from.
    """
    encoder = Encoder(tokenizer, ends)
    everything = not completion_only
    store = stored(encoder, records, f"sft {everything=}", lambda record: encoder.asking(record, everything))
    examples, cut, dropped = store.learned(max_length)
    if not examples:
        raise SpectuneError(
            f"no example has a token to learn from within max_length={max_length}; raise it, or check the data"
        )
    return Encoded(examples, cut, dropped, store.notes)

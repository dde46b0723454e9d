"""Which records a model answers right: by the label it chooses, or by its reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from spectune.bases.generation import generate
from spectune.bases.prompts import Message, text_of
from spectune.errors import SpectuneError
from spectune.model.fusing import fused_where_it_pays
from spectune.training.data.records import Record, form

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_AT_ONCE = 32  # prompts


@contextmanager
def labels_chosen(model: nn.Module, chosen: list[int]) -> Iterator[None]:
    """Within the context, add the labels that a classifier chooses outside training to a list."""
    watch = model.register_forward_hook(
        lambda module, inputs, out: None if module.training else chosen.extend(out.logits.argmax(-1).tolist())
    )
    try:
        yield
    finally:
        watch.remove()


def exact_matches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, fused: bool = True
) -> list[int]:
    """Return for each record whether the model's greedy reply is its completion, but for space around it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        records: with messages, or prompt and completion; the last completion is what is asked for.
        fused: answer from merged weights beside the base's, where that is faster.
    """
    asked = [question(record) for record in records]
    longest = max(len(tokenizer(answer)["input_ids"]) for _, answer, _ in asked)
    right = [0] * len(asked)
    passes = (longest + 4) * -(-len(asked) // _AT_ONCE)
    with fused_where_it_pays(model, passes, allowed=fused):
        for raw in (False, True):
            places = [i for i, question in enumerate(asked) if question[2] == raw]
            for start in range(0, len(places), _AT_ONCE):
                part = places[start : start + _AT_ONCE]
                questions = [asked[i][0] for i in part]
                settings = {"max_new_tokens": longest + 4, "raw": raw, "fused": fused}
                replies = generate(model, tokenizer, questions, **settings)
                for i, reply in zip(part, replies, strict=True):
                    right[i] = int(reply.text.strip() == asked[i][1].strip())
    return right


def question(record: Record) -> tuple[str | Sequence[Message], str, bool]:
    """Return what a record asks, the answer it has, and whether both are text as it is.

    Raises:
        SpectuneError: a record without a completion.
    """
    kind = form(record)
    if kind == "messages":
        *before, last = record["messages"]
        return before, text_of(last), False
    if kind == "completion" and isinstance(record["prompt"], list):
        return record["prompt"], text_of(record["completion"][-1]), False
    if kind == "completion":
        return record["prompt"], record["completion"], True
    raise SpectuneError("metric: exact_match needs records with messages, or with prompt and completion")

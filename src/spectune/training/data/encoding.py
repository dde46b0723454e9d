"""Examples: records tokenized with the loss on completions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spectune.errors import SpectuneError
from spectune.training.data.records import Record, form


class Example(NamedTuple):
    """One tokenized example.

    Args:
        tokens: its token ids.
        supervised: for each token, whether the loss is on it.
    """

    tokens: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class Encoded:
    """The examples of a data set, and what became of the others.

    Args:
        examples: those that are trained on, as the task has them.
        cut: how many were longer than the limit and were cut off.
        dropped: how many had no supervised token (left).
    """

    examples: list[Any]
    cut: int
    dropped: int


def encode_one(record: Record, tokenizer: Any) -> Example:
    """Tokenize one record."""
    kind = form(record)
    if kind == "messages":
        return encode_turns(record["messages"], tokenizer)
    if kind == "text":
        return _pieces(tokenizer, [(record["text"], True)])
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list):
        return encode_turns([*prompt, *completion], tokenizer, len(prompt))
    return _pieces(tokenizer, [(prompt, False), (completion, True)])


def _pieces(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> Example:
    tokens: list[int] = [] if tokenizer.bos_token_id is None or not _adds_bos(tokenizer) else [tokenizer.bos_token_id]
    supervised = [False] * len(tokens)
    for text, learned in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        supervised += [learned] * len(ids)
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
        supervised.append(True)
    return Example(tokens, supervised)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode_turns(messages: Sequence[Mapping[str, str]], tokenizer: Any, first: int = 0) -> Example:
    """Tokenize a conversation; the loss is on the assistant's turns from the `first` message on.

    Raises:
        SpectuneError: no chat template, or one that rewrites earlier turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SpectuneError("the tokenizer has no chat template for 'messages'; use prompt and completion, or text")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if i < first or message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        until = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (text.startswith(until.rstrip()) and until.startswith(before)):
            raise SpectuneError("the chat template rewrites earlier turns, so that completions cannot be told apart")
        spans.append((len(before), len(until.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [any(a <= start and end <= b for a, b in spans) for start, end in encoded["offset_mapping"]]
    return Example(encoded["input_ids"], supervised)

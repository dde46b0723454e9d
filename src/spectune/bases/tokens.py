"""Tokens of texts: asked of a tokenizer once, joined as they would be in one text, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


# what was asked of a tokenizer, by the question
_KNOWN: WeakKeyDictionary[object, dict[object, Any]] = WeakKeyDictionary()


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a text, None where the tokenizer has none."""
    return cast("int | None", tokenizer.eos_token_id)  # transformers has one type for all special tokens and texts


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up rows: the end of text, or any, where the tokenizer has none of its own."""
    own = cast("int | None", tokenizer.pad_token_id)
    return own if own is not None else end_of_text(tokenizer) or 0


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text alone."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


# what asks for the tokens of texts, one after the other, and returns something: many can run at once, and a tokenizer
# is given the texts that all of them ask for together
Asking = Generator[str, list[int], T]


def answered(tokenizer: PreTrainedTokenizerBase, asking: Asking[T]) -> T:
    """Return what comes of something that asks for tokens."""
    return answered_together(tokenizer, [asking])[0]


def answered_together(tokenizer: PreTrainedTokenizerBase, askings: Sequence[Asking[T]]) -> list[T]:
    """Return what comes of each of several that ask for tokens, their texts given to the tokenizer at once."""
    found: dict[int, T] = {}
    tokens: dict[int, list[int] | None] = dict.fromkeys(range(len(askings)))
    while tokens:
        texts: dict[int, str] = {}
        for i, given in tokens.items():
            try:
                texts[i] = next(askings[i]) if given is None else askings[i].send(given)
            except StopIteration as end:
                found[i] = end.value
        tokens = dict(zip(texts, _ids_of_all(tokenizer, [*texts.values()]), strict=True))
    return [found[i] for i in range(len(askings))]


def _ids_of_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if len(texts) < 2:
        return [ids(tokenizer, text) for text in texts]
    # one call for all texts: a fast tokenizer takes them in parallel, and each call has a cost of its own
    distinct = [*dict.fromkeys(text for text in texts if text)]
    tokens = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"] if distinct else []
    known = {"": [], **dict(zip(distinct, tokens, strict=True))}
    return [known[text] for text in texts]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens that a text begins with: what the tokenizer puts before it, unless it is there, and its own."""
    return begun(tokenizer, ids(tokenizer, text))


def begun(tokenizer: PreTrainedTokenizerBase, own: list[int]) -> list[int]:
    """Return the tokens of a text behind what the tokenizer puts before every text, unless it is there."""
    first = known(tokenizer, "first", lambda: _first(tokenizer))
    return own if own[: len(first)] == first else [*first, *own]


def _first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    whole, own = tokenizer("a")["input_ids"], ids(tokenizer, "a")
    starts = (i for i in range(len(whole) - len(own) + 1) if own and whole[i : i + len(own)] == own)
    return whole[: next(starts, int(bool(whole) and whole[0] == tokenizer.bos_token_id))]


def continuing(tokenizer: PreTrainedTokenizerBase, before: str, tokens: Sequence[int], text: str) -> Asking[list[int]]:
    """Ask for and return the tokens of a text behind another one whose tokens are given and stay.

    They are those of both texts together where these begin with the tokens given.  Elsewhere, as where a prompt ends
    in a space that would be part of the next word's token, the text is taken apart, but not as the beginning of a text,
    before which many tokenizers put a space.

    Args:
        tokenizer: the model's.
        before: the text before, without what the tokenizer puts before every text.
        tokens: its tokens.
        text: the text that follows.
    """
    if not text:
        return []
    found: list[list[int]] = []
    joint = yield before + text
    if joint[: len(tokens)] == list(tokens):
        found.append(joint[len(tokens) :])
        if not text[0].isspace():
            return found[0]
    said = decoded(tokenizer, tokens)
    # behind something that is no space: many tokenizers put one before a text's beginning. What decodes to both texts
    # is taken
    for lead in ("\n", ".", "a", ""):
        alone = known(tokenizer, ("alone", lead), lambda lead=lead: ids(tokenizer, lead))
        both = yield lead + text
        if both[: len(alone)] == alone:
            found.append(both[len(alone) :])
    return next((c for c in found if decoded(tokenizer, [*tokens, *c]) == said + text), found[0])


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of tokens, the special ones among them."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)  # a list of texts is the answer to a list of lists


def added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int, int]]:
    """Return where the tokenizer's added tokens start and end in a text, and which they are."""
    added = known(tokenizer, "added", lambda: {t.content: i for i, t in tokenizer.added_tokens_decoder.items()})
    if not added:
        return []
    longest_first = sorted(added, key=len, reverse=True)
    pattern = known(tokenizer, "pattern", lambda: re.compile("|".join(map(re.escape, longest_first))))
    return [(found.start(), found.end(), added[found.group()]) for found in pattern.finditer(text)]


def first_added(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int | None]:
    """Return what comes before the first of the tokenizer's added tokens in a text, and that token."""
    for start, _, token in added_tokens(tokenizer, text):
        return text[:start], token
    return text, None


def known(tokenizer: PreTrainedTokenizerBase, question: object, answer: Callable[[], T]) -> T:
    """Return what was answered to a question about a tokenizer with its chat template, which is asked once."""
    template = getattr(tokenizer, "chat_template", None)
    key = (question, str(template), len(tokenizer), end_of_text(tokenizer))
    known = _KNOWN.setdefault(tokenizer, {})
    if key not in known:
        known[key] = answer()
    return known[key]

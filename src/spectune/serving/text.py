"""Tokens as text while they come: no half characters, nothing of a stop string, the same text as all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from spectune.bases.tokens import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE = 6  # tokens of the prompt that a decoder may look at: whether a space comes first, say
_MOST_HALVES = 3  # bytes of a character that lacks one
_HALF = "\ufffd"  # what tokenizers write for bytes that are no character


class TextStream:
    """The text of one reply, from token to token.

    A token may end within a character, and a text may turn out to begin a stop string: both are held back until it is
    known what they are.

    Args:
        tokenizer: the model's.
        prompt: the tokens before.
        stops: strings that end the text, which are left out.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens = list(prompt[-_BEFORE:])  # from where the text is decoded
        self._whole = len(self._tokens)  # of them, those whose text is known to the last character
        self._given = len(self._decode())  # characters
        self._held = ""  # text that may begin a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain with one token more."""
        self._tokens.append(token)
        text = self._decode()
        sure = len(text)
        while sure > max(self._given, len(text) - _MOST_HALVES) and text[sure - 1] == _HALF:
            sure -= 1
        more = text[self._given : sure]
        self._given = max(self._given, sure)
        if more and sure == len(text):  # what is behind needs a look at these tokens and none before
            del self._tokens[: self._whole]
            self._whole, self._given = len(self._tokens), len(self._decode())
        return self._certain(more) if more else ""

    def end(self) -> str:
        """Return what is left when no more tokens come; a character that is not whole is left out."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)  # a list of texts is the answer to a list of lists

    def _certain(self, more: str) -> str:
        text = self._held + more
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of a text a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return a token's bytes, also where they are part of a character."""
    written = cast("str | None", tokenizer.convert_ids_to_tokens(token))
    if written is None:
        return b""
    if written.startswith("<0x") and written.endswith(">") and len(written) == 6:
        return bytes([int(written[3:5], 16)])
    text = decoded(tokenizer, [token])
    if _HALF not in text:
        return text.encode()
    try:
        return bytes(_BYTES[character] for character in written)
    except KeyError:
        return text.encode()


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter stands for in the vocabularies of byte-level tokenizers (GPT-2's)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()

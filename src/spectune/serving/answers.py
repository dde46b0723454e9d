"""Replies in OpenAI's words: whole, or piece by piece."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectune.serving.jobs import Event
from spectune.serving.sampling import Logprobs
from spectune.serving.text import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Reply:
    """What came of one reply so far."""

    text: str = ""
    logprobs: list[Logprobs] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None


class Answer:
    """The answer to a request.

    Args:
        model: as the request names it.
        told: of the adapters that answer, which every object carries under "adapters", and of what chose them.
        prompt_tokens: of all prompts.
        replies: how many there are.
        tokenizer: for the texts of tokens.
        usage: whether a stream ends with a chunk that tells the numbers of tokens.
        cached: tells how many tokens of prompts were known.
    """

    prefix = kind = chunk_kind = ""

    def __init__(
        self,
        model: str,
        told: Mapping[str, object],
        prompt_tokens: int,
        replies: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        usage: bool = False,
        cached: Callable[[], int] = lambda: 0,
    ) -> None:
        self.model, self.told, self.prompt_tokens = model, told, prompt_tokens
        self.replies = [Reply() for _ in range(replies)]
        self._tokenizer, self._usage, self._cached = tokenizer, usage, cached
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def take(self, event: Event) -> None:
        """Take note of what came."""
        reply = self.replies[event.row]
        reply.text += event.text
        reply.logprobs += event.logprobs
        reply.tokens, reply.finish = event.tokens, event.finish

    @property
    def complete(self) -> bool:
        """Whether every reply has ended."""
        return all(reply.finish for reply in self.replies)

    @property
    def tokens(self) -> int:
        """Tokens of all replies so far."""
        return sum(reply.tokens for reply in self.replies)

    @property
    def usage(self) -> dict[str, object]:
        """The tokens of prompts and replies."""
        tokens = self.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached()},
        }

    def whole(self) -> dict[str, object]:
        """Return the answer at once."""
        choices = [self._choice(i, reply) for i, reply in enumerate(self.replies)]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage}

    def first(self) -> list[dict[str, object]]:
        """Return the chunks that come before any text."""
        return []

    def chunk(self, event: Event) -> dict[str, object]:
        """Return what came as a chunk of a stream."""
        return self._chunk([self._piece(event)])

    def last(self) -> list[dict[str, object]]:
        """Return the chunks that come after all text."""
        return [{**self._head(self.chunk_kind), "choices": [], "usage": self.usage}] if self._usage else []

    def _chunk(self, choices: list[dict[str, object]]) -> dict[str, object]:
        return {**self._head(self.chunk_kind), "choices": choices, **({"usage": None} if self._usage else {})}

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model, **self.told}

    def _choice(self, index: int, reply: Reply) -> dict[str, object]:
        raise NotImplementedError

    def _piece(self, event: Event) -> dict[str, object]:
        raise NotImplementedError

    def _token_text(self, token: int) -> str:
        return token_bytes(self._tokenizer, token).decode(errors="replace")


class ChatAnswer(Answer):
    """The answer to a chat."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[dict[str, object]]:
        start = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": start, "logprobs": None, "finish_reason": None}])
            for i in range(len(self.replies))
        ]

    def _choice(self, index: int, reply: Reply) -> dict[str, object]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply.logprobs),
            "finish_reason": reply.finish,
        }

    def _piece(self, event: Event) -> dict[str, object]:
        return {
            "index": event.row,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event.logprobs),
            "finish_reason": event.finish,
        }

    def _logprobs(self, found: Sequence[Logprobs]) -> dict[str, object] | None:
        if not found:
            return None
        content = [
            {**self._one(one.token, one.logprob), "top_logprobs": [self._one(*other) for other in one.likeliest]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, object]:
        bytes_ = token_bytes(self._tokenizer, token)
        return {"token": bytes_.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(bytes_)}


class CompletionAnswer(Answer):
    """The answer to a completion."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._offsets = [0] * len(self.replies)

    def _choice(self, index: int, reply: Reply) -> dict[str, object]:
        return {
            "index": index,
            "text": reply.text,
            "logprobs": self._logprobs(index, reply.logprobs),
            "finish_reason": reply.finish,
        }

    def _piece(self, event: Event) -> dict[str, object]:
        return {
            "index": event.row,
            "text": event.text,
            "logprobs": self._logprobs(event.row, event.logprobs),
            "finish_reason": event.finish,
        }

    def _logprobs(self, index: int, found: Sequence[Logprobs]) -> dict[str, object] | None:
        if not found:
            return None
        texts, offsets = [], []
        for one in found:
            texts.append(self._token_text(one.token))
            offsets.append(self._offsets[index])
            self._offsets[index] += len(texts[-1])
        likeliest = [{self._token_text(t): _finite(lp) for t, lp in reversed(one.likeliest)} for one in found]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": likeliest if any(likeliest) else None,
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    """Return a log probability that JSON can hold, as OpenAI writes what is impossible."""
    return logprob if math.isfinite(logprob) else -9999.0


def failure(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """Return an error in OpenAI's words."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

"""Conversations: what a message may be, and which of them are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spectune.bases.prompts import Message
from spectune.errors import SpectuneError

FLAGS = ("weight", "train")  # of a message: whether it is learned
_KNOWN = {"role", "content", *FLAGS}


def is_conversation(value: object) -> bool:
    """Whether a value is a list of messages, at least one, each with a role, and a content or a call of tools."""
    return isinstance(value, list) and len(value) > 0 and all(message_fault(message) is None for message in value)


def message_fault(message: object) -> str | None:
    """Return what is wrong with one message, or None."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        return "each message needs a role and a content, both text"
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if not isinstance(part, str)]
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                return f"a message's content has a part of the type {kind!r}, and only text is learned"
    elif not isinstance(content, str) and not (content is None and _calls(message)):
        return "each message needs a role and a content, both text"
    for flag in FLAGS:
        if message.get(flag) not in (None, 0, 1):
            return f"a message's {flag} must be 0 or 1, not {message[flag]!r}"
    return None


def _calls(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def is_learned(message: Message) -> bool:
    """Whether a message is the assistant's, and not marked as context."""
    return message["role"] == "assistant" and all(message.get(flag) in (None, 1) for flag in FLAGS)


def message_problem(messages: object, first: int = 0) -> str | None:
    """Return what is wrong with a conversation to learn from, from the `first` message on, or None."""
    if not isinstance(messages, list) or not messages:
        return "messages must be a list of objects with role and content"
    for number, message in enumerate(messages, start=1):
        fault = message_fault(message)
        if fault is not None:
            return fault if len(messages) == 1 else f"{fault} (message {number})"
    if not any(message["role"] == "assistant" for message in messages[first:]):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        return f"messages has no assistant turn to learn from (roles: {roles})"
    if not any(map(is_learned, messages[first:])):
        return "messages has no assistant turn to learn from: each has weight 0 or train false"
    return None


def other_fields(messages: Sequence[Message]) -> set[str]:
    """Return the fields of messages beside role and content that have a value."""
    return {key for message in messages for key, value in message.items() if value is not None} - _KNOWN


def check_calls(message: Message, written: str) -> None:
    """Raise where a chat template leaves out what an assistant's message calls.

    Raises:
        SpectuneError: the name of the function is not in what is written.
    """
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or call).get("name") if isinstance(call, Mapping) else None
        if name and str(name) not in written:
            raise SpectuneError(
                f"the chat template does not write tool calls ({name}): take a model whose template does, or write "
                "calls into the content"
            )

"""Conversations: what a message may be, and which of them are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spectune.bases.prompts import Message
from spectune.errors import SpectuneError
from spectune.reading import parse_json

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt", "bing", "bard", "answer"), "assistant"),
    **dict.fromkeys(("chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
    **{"system": "system", "developer": "developer"},
}
FLAGS = ("weight", "train", "training", "loss")  # of a message, as several tools call it: whether it is learned
_NO_FLAGS = ("mask", "masked", "loss_mask", "loss_weight", "train_detail", "training_detail", "train_on_turn")
_KNOWN = {"role", "content", *FLAGS}


def as_messages(value: object) -> list[Any] | None:
    """Return messages with role and content, whatever their format calls these; None where they are no messages."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return None
    return [_as_message(message) for message in value]


def _as_message(message: Mapping[str, Any]) -> dict[str, object]:
    said = dict(message)
    for ours, theirs in (("role", ("from", "speaker", "author")), ("content", ("value", "text", "message"))):
        name = next((key for key in theirs if ours not in said and key in said), None)
        if name is not None:
            said[ours] = said.pop(name)
    role = said.get("role")
    if role in ("function_call", "tool_call"):  # ShareGPT with tools: the call is JSON, and the assistant's
        try:
            call = parse_json(said["content"], "the call")
        except (SpectuneError, KeyError, TypeError):
            return {**said, "role": "assistant"}
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(each, Mapping) for each in calls):  # a number, say, which is JSON too
            return {**said, "role": "assistant"}
        wrapped = [{"type": "function", "function": each} for each in calls]
        return {**said, "role": "assistant", "content": "", "tool_calls": wrapped}
    if isinstance(role, str):
        said["role"] = _ROLES.get(role.strip().lower(), role)
    if isinstance(said.get("tool_calls"), str) and said["tool_calls"].strip():  # as tables hold it
        said["tool_calls"] = parse_json(said["tool_calls"], "'tool_calls'")
    if said.get("tool_calls"):
        said["tool_calls"] = without_nulls(said["tool_calls"])
    return said


def without_nulls(value: object) -> object:
    """Return a value without the keys that a table adds to objects of another shape."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


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
        if flag != "weight" and message.get(flag) == 1 and message["role"] != "assistant":  # all may have a weight
            return f"a message of the {message['role']} has {flag}={message[flag]!r}, and the assistant's are learned"
    other = next((flag for flag in _NO_FLAGS if message.get(flag) is not None), None)
    if other is not None:
        return f"a message has {other!r}, which would change what is learned: say it by 'weight', 0 or 1"
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return f"a message's tool_calls must be a list of calls, not {calls!r:.40}"
    return None


def _is_call(call: object) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function") or {}, dict)


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


def kinds_of(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return what some values are that should all be text, or all be lists of messages, in words."""
    other = next((key for key in keys if not isinstance(values.get(key), (str, list))), None)
    if other is not None:
        value = values.get(other)
        remedy = ": write it in quotes" if isinstance(value, (int, float)) and math.isfinite(value) else ""
        return f"{other} is {values.get(other)!r:.40}{remedy}"
    return ", ".join(f"{key} is {'text' if isinstance(values[key], str) else 'a list'}" for key in keys)


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

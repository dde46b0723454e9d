"""Prompts as tokens: the one way in which training, generation, rewards and evaluations begin and end a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from spectune.bases.tokens import end_of_text, first_added, ids, known, text_tokens
from spectune.errors import SpectuneError
from spectune.reading import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # of a conversation, as chat templates take it
MARK = "spectuneanswer"  # a content that no template changes
_ASK = "spectunequestion"
_NO_TEMPLATE = "the tokenizer has no chat template; give one text instead of messages"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    raw: bool = False,
    tools: Sequence[object] | None = None,
    variables: Mapping[str, object] | None = None,
) -> list[int]:
    """Return the tokens of a prompt, as a user's turn where the tokenizer has a chat template.

    A text begins with what the tokenizer puts before every text, once, and never ends with what it puts behind.

    Args:
        tokenizer: the model's.
        prompt: the user's text, or the messages so far.
        raw: continue the text as it is.
        tools: of the conversation, for the template.
        variables: others of the template, such as enable_thinking.

    Raises:
        SpectuneError: messages for a tokenizer that has no chat template, or that its template refuses.
    """
    templated = bool(getattr(tokenizer, "chat_template", None)) and not raw
    if isinstance(prompt, str):
        if not templated:
            return text_tokens(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    return ids(tokenizer, prompt_text(tokenizer, prompt, tools=tools, variables=variables))


# -- chat templates


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[object] | None = None,
    variables: Mapping[str, object] | None = None,
    prompt: bool = False,
) -> str:
    """Return messages as the chat template writes them.

    Args:
        tokenizer: with a chat template.
        messages: the messages.
        tools: of the conversation.
        variables: others of the template.
        prompt: end where the next reply begins.

    Raises:
        SpectuneError: no chat template, or messages that it refuses.
    """
    return _rendered(tokenizer, messages, tools, variables, prompt)[0]


def marked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[object] | None = None,
    variables: Mapping[str, object] | None = None,
) -> list[tuple[int, int]] | None:
    """Return the spans of characters that the template marks with {% generation %}, or None where it has no marks."""
    if not _MARKS.search(_template(tokenizer, tools)):
        return None
    return _rendered(tokenizer, messages, tools, variables, False, True)[1]


def _template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[object] | None = None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise SpectuneError(_NO_TEMPLATE)
    return tokenizer.get_chat_template(None, cast(Any, tools))


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[object] | None = None,
    variables: Mapping[str, object] | None = None,
    prompt: bool = False,
    marks: bool = False,
    parts: bool | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    template = _template(tokenizer, tools)
    options = {**tokenizer.special_tokens_map, **(variables or {})}
    as_parts = known(tokenizer, "parts", lambda: _wants_parts(tokenizer)) if parts is None else parts
    failed: Exception | None = None
    for as_text in (False, True):  # most templates write the arguments of calls as JSON, some take JSON
        try:
            rendered: Any = render_jinja_template(  # which the tokenizer's own apply_chat_template calls
                conversations=[plain(messages, as_text, as_parts)],
                tools=cast(Any, list(tools)) if tools else None,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **options,
            )
            return rendered[0][0], rendered[1][0] if marks else []
        except (TemplateError, TypeError, ValueError) as error:  # what templates raise, and what they stumble over
            failed = failed or error
            if not any(message.get("tool_calls") for message in messages):
                break
    roles = ", ".join([str(message.get("role")) for message in messages[:9]] + ["..."] * (len(messages) > 9))
    systems = any(message.get("role") == "system" for message in messages)
    remedy = "; if it knows no system message, put its text into the first user's" if systems else ""
    raise SpectuneError(f"the chat template refuses the messages ({roles}): {failed}{remedy}") from None


def _wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template takes contents as lists of parts, and not as text (models of texts and pictures)."""
    for parts in (False, True):
        try:
            if MARK in _rendered(tokenizer, [{"role": "user", "content": MARK}], parts=parts)[0]:
                return parts
        except SpectuneError:
            continue
    return False


def text_of(message: Message) -> str:
    """Return what a message says, of which the content may be a text, a list of parts, or nothing beside a call."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(p if isinstance(p, str) else p["text"] for p in content)


def plain(messages: Sequence[Message], as_text: bool = False, parts: bool = False) -> list[dict[str, Any]]:
    """Return messages as chat templates take them: a content is text, calls are OpenAI's, no key is without a value.

    Args:
        messages: the messages.
        as_text: the arguments of a call are JSON, and an object otherwise.
        parts: a content is a list of one part.
    """
    found = []
    for message in messages:
        said = {key: value for key, value in message.items() if value is not None}
        said["content"] = text_of(said)  # many templates write None, or stumble over a key that is not there
        if parts:
            said["content"] = [{"type": "text", "text": said["content"]}] if said["content"] else []
        if isinstance(said.get("function_call"), Mapping):  # the older form
            said.setdefault("tool_calls", [{"type": "function", "function": said.pop("function_call")}])
        if said.get("tool_calls"):
            said["tool_calls"] = [_call(call, as_text) for call in said["tool_calls"]]
        found.append(said)
    return found


def _call(call: object, as_text: bool) -> object:
    if not isinstance(call, Mapping):
        return call
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text)}
    arguments = call.get("arguments")
    try:
        if isinstance(arguments, str) and not as_text:
            call["arguments"] = parse_json(arguments, "the arguments")
        elif isinstance(arguments, Mapping) and as_text:
            call["arguments"] = json.dumps(arguments, ensure_ascii=False)
    except ValueError:
        pass  # no JSON: it is written as it is
    return call


def uses(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template reads a variable, or a field of messages, of this name."""
    return re.search(rf"\b{re.escape(name)}\b", _template(tokenizer, None) + _template(tokenizer, [])) is not None


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[object] | None = None,
    variables: Mapping[str, object] | None = None,
) -> str:
    """Return messages up to where the assistant's reply begins.

    A template that has no generation prompt gets the header that it writes before a reply, which a reply would
    otherwise have to begin with.

    Raises:
        SpectuneError: no chat template, or messages that it refuses or leaves out.
    """
    if not messages:  # a reply that begins the conversation: what the template writes before it
        return render(tokenizer, [{"role": "assistant", "content": MARK}], tools=tools, variables=variables).partition(
            MARK
        )[0]
    for message in messages:
        role = str(message.get("role"))
        if not known(tokenizer, role, lambda role=role: _writes(tokenizer, role)):
            raise SpectuneError(
                f"the chat template leaves out messages of the role {role!r}: put their text into a user's message"
            )
    text = render(tokenizer, messages, tools=tools, variables=variables, prompt=True)
    return text + known(tokenizer, "header", lambda: _header(tokenizer))


def _writes(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Whether the template writes messages of a role, or refuses them."""
    said, ask = {"role": role, "content": MARK}, {"role": "user", "content": _ASK}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    called = [ask, {"role": "assistant", "content": "", "tool_calls": [call]}, said]
    left_out = False
    for messages in ([said, ask], called, [ask, said], [ask, {"role": "assistant", "content": _ASK}, said]):
        try:
            if MARK in render(tokenizer, messages):
                return True
            left_out = True
        except SpectuneError:
            continue
    return not left_out  # one that refuses the role says so itself


def _header(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a template without a generation prompt writes before a reply, other than spaces."""
    ask = [{"role": "user", "content": _ASK}]
    prompt = render(tokenizer, ask, prompt=True)
    if prompt != render(tokenizer, ask):
        return ""
    try:
        whole = render(tokenizer, [*ask, {"role": "assistant", "content": MARK}])
    except SpectuneError:
        return ""
    header = whole[len(prompt) : whole.find(MARK)] if whole.startswith(prompt) and MARK in whole else ""
    return header.rstrip(" ") if header.strip() else ""


# -- ends


class Ending(NamedTuple):
    """How a chat template ends an assistant's turn.

    Args:
        suffix: what it writes behind the reply.
        gap: of it, what comes before the stop.
        stop: the token that ends a reply, None where there is none.
        own: whether the template writes it.
    """

    suffix: str
    gap: str
    stop: int | None
    own: bool


def ending(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> Ending:
    """Return how the chat template ends an assistant's turn.

    The stop is the first of the tokenizer's added tokens that the template writes behind a reply; or the one that the
    next turn begins with, where generation ends with it (as GLM's does with <|user|>); or else the end of text.

    Args:
        tokenizer: with a chat template.
        ends: tokens that end the model's generation.
    """
    ends = tuple(ends)
    return known(tokenizer, ("ending", ends), lambda: _ending(tokenizer, {*ends, end_of_text(tokenizer)}))


def _ending(tokenizer: PreTrainedTokenizerBase, ends: set[int | None]) -> Ending:
    talk = [{"role": "user", "content": _ASK}, {"role": "assistant", "content": MARK}]
    try:
        suffix = render(tokenizer, talk).rpartition(MARK)[2]
        following = render(tokenizer, [*talk, {"role": "user", "content": _ASK}]).rpartition(MARK)[2]
    except SpectuneError:
        return Ending("", "", end_of_text(tokenizer), False)
    gap, stop = first_added(tokenizer, suffix)
    if stop is not None:
        return Ending(suffix, gap, stop, True)
    gap, stop = first_added(tokenizer, following)
    if stop in ends and not gap.strip():
        return Ending(suffix, gap, stop, True)
    return Ending(suffix, "", end_of_text(tokenizer), False)


def stop_tokens(model: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a reply: the model's or else the tokenizer's, and the one that its template writes."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = end_of_text(tokenizer) if own is None else own
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    if getattr(tokenizer, "chat_template", None):
        stop = ending(tokenizer, ends).stop
        ends += [] if stop is None or stop in ends else [stop]
    return ends

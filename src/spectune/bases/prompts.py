"""Prompts as tokens: the one way in which training, generation, rewards and evaluations begin and end a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

from spectune.errors import SpectuneError
from spectune.reading import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # of a conversation, as chat templates take it
T = TypeVar("T")
MARK = "spectuneanswer"  # a content that no template changes
_ASK = "spectunequestion"
# what was asked of a tokenizer, by the question
_KNOWN: WeakKeyDictionary[object, dict[object, Any]] = WeakKeyDictionary()
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


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a text, None where the tokenizer has none."""
    return cast("int | None", tokenizer.eos_token_id)  # transformers has one type for all special tokens and texts


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up rows, any where the tokenizer has none: what is masked is not looked at."""
    return cast("int | None", tokenizer.pad_token_id) or 0


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
    distinct = [*dict.fromkeys(text for text in texts if text)]
    tokens = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"] if distinct else []
    known = {"": [], **dict(zip(distinct, tokens, strict=True))}
    return [known[text] for text in texts]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens that a text begins with: what the tokenizer puts before it, unless it is there, and its own."""
    return begun(tokenizer, ids(tokenizer, text))


def begun(tokenizer: PreTrainedTokenizerBase, own: list[int]) -> list[int]:
    """Return the tokens of a text behind what the tokenizer puts before every text, unless it is there."""
    first = _known(tokenizer, "first", lambda: _first(tokenizer))
    return own if own[: len(first)] == first else [*first, *own]


def _first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    whole, own = tokenizer("a")["input_ids"], ids(tokenizer, "a")
    starts = (i for i in range(len(whole) - len(own) + 1) if own and whole[i : i + len(own)] == own)
    return whole[: next(starts, int(bool(whole) and whole[0] == tokenizer.bos_token_id))]


def continuation(tokenizer: PreTrainedTokenizerBase, before: str, tokens: Sequence[int], text: str) -> list[int]:
    """Return the tokens of a text behind another one whose tokens are given and stay, as `continuing` does."""
    return answered(tokenizer, continuing(tokenizer, before, tokens, text))


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
    for lead in ("\n", ".", "a", ""):
        alone = _known(tokenizer, ("alone", lead), lambda lead=lead: ids(tokenizer, lead))
        both = yield lead + text
        if both[: len(alone)] == alone:
            found.append(both[len(alone) :])
    return next((c for c in found if decoded(tokenizer, [*tokens, *c]) == said + text), found[0])


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of tokens, the special ones among them."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)  # a list of texts is the answer to a list of lists


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
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _template(tokenizer, tools)
    options = {**tokenizer.special_tokens_map, **(variables or {})}
    as_parts = _known(tokenizer, "parts", lambda: _wants_parts(tokenizer)) if parts is None else parts
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
        content = said.get("content")
        if isinstance(content, list):
            said["content"] = "".join(part if isinstance(part, str) else part["text"] for part in content)
        elif content is None:
            said["content"] = ""  # many templates write None, or stumble over a key that is not there
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
        if not _known(tokenizer, role, lambda role=role: _writes(tokenizer, role)):
            raise SpectuneError(
                f"the chat template leaves out messages of the role {role!r}: put their text into a user's message"
            )
    text = render(tokenizer, messages, tools=tools, variables=variables, prompt=True)
    return text + _known(tokenizer, "header", lambda: _header(tokenizer))


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
    return _known(tokenizer, ("ending", ends), lambda: _ending(tokenizer, {*ends, end_of_text(tokenizer)}))


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


def added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int, int]]:
    """Return where the tokenizer's added tokens start and end in a text, and which they are."""
    added = _known(tokenizer, "added", lambda: {t.content: i for i, t in tokenizer.added_tokens_decoder.items()})
    if not added:
        return []
    longest_first = sorted(added, key=len, reverse=True)
    pattern = _known(tokenizer, "pattern", lambda: re.compile("|".join(map(re.escape, longest_first))))
    return [(found.start(), found.end(), added[found.group()]) for found in pattern.finditer(text)]


def first_added(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int | None]:
    """Return what comes before the first of the tokenizer's added tokens in a text, and that token."""
    for start, _, token in added_tokens(tokenizer, text):
        return text[:start], token
    return text, None


def stop_tokens(model: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a reply: the model's or else the tokenizer's, and the one that its template writes."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = end_of_text(tokenizer) if own is None else own
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    if getattr(tokenizer, "chat_template", None):
        stop = ending(tokenizer, ends).stop
        ends += [] if stop is None or stop in ends else [stop]
    return ends


def _known(tokenizer: PreTrainedTokenizerBase, question: object, answer: Callable[[], T]) -> T:
    """Return what was answered to a question about a tokenizer with its chat template, which is asked once."""
    template = getattr(tokenizer, "chat_template", None)
    key = (question, str(template), len(tokenizer), end_of_text(tokenizer))
    known = _KNOWN.setdefault(tokenizer, {})
    if key not in known:
        known[key] = answer()
    return known[key]

"""Formats in which data is published, recognised by the keys of a record, as the records that tasks take."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from spectune.errors import SpectuneError
from spectune.reading import parse_json
from spectune.training.data.common import in_common, says_yes
from spectune.training.data.messages import as_messages, without_nulls

Values = Mapping[str, Any]
_ASKED = ("instruction", "question", "query", "inputs", "input")
_ANSWERED = ("output", "response", "answer", "completion", "targets", "target")
_CONTEXT = ("context", "input")
_LISTS = ("messages", "conversations", "conversation", "tools", "functions", "chosen", "rejected", "prompt", "history")
_HH = re.compile(r"\n\n(Human|Assistant): ?")
# fields that would change what is learned if they were read: in any form, and beside a prompt and its completion
_MEANT = {
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
    "weight",
    "loss_weight",
    "train",
    "mask",
    "loss_mask",
    "documents",
    "enable_thinking",
}
_AROUND = {"tools", "functions", "system", "system_prompt", "instruction", "input", "context", "history"}
_AROUND |= {"options", "choices", "prefix", "suffix"}


class Converted(NamedTuple):
    """A record as tasks take it.

    Args:
        values: its keys.
        format: the name of the format that it was in.
        plain: the same as a text prompt and completion, for tokenizers without a chat template.
        read: the keys of the original that are in it.
    """

    values: dict[str, Any]
    format: str
    plain: dict[str, str] | None = None
    read: tuple[str, ...] = ()


def convert(record: Values, task: str) -> Converted:
    """Return a record as a task takes it; one in no known format stays as it is.

    Args:
        record: as it was read.
        task: sft, classify, dpo, kto or reinforce.
    """
    values = {key: _parsed(key, value) for key, value in record.items()}
    options = values.get("chat_template_kwargs")
    if isinstance(options, str) and options.strip():  # as tables hold it
        options = values["chat_template_kwargs"] = parse_json(options, "'chat_template_kwargs'")
    if options and not isinstance(options, Mapping):
        raise SpectuneError(f"'chat_template_kwargs' must be an object, and is {options!r:.40}")
    if task == "classify":
        return Converted(values, "")
    there = {key: value for key, value in values.items() if value is not None}
    for recognise in (_preference, _unpaired, _conversation, _pair):
        found = recognise(there, task)
        if found is not None:
            rest = {key: value for key, value in there.items() if key not in found.read}
            return found._replace(values={**rest, **found.values})
    return Converted(values, "text" if "text" in there else "")


def unread(converted: Converted, record: Values, form: Collection[str]) -> tuple[set[str], set[str]]:
    """Return the fields that nothing reads of a record, of which the second would change what is learned.

    Args:
        converted: the record as a task takes it.
        record: as it was read.
        form: the fields of it that are learned from.
    """
    own = {*form, "tools", "chat_template_kwargs", *converted.read}
    own |= {"prompt"} if _says(converted.values.get("messages"), record.get("prompt")) else set()
    rest = {key for key, value in record.items() if value not in (None, "", [], {})} - own
    values = converted.values
    if "messages" not in values and not isinstance(values.get("prompt"), list) and record.get("tools"):
        rest |= {"tools"}
    around = _AROUND if values.keys() & {"completion", "chosen"} else set()
    around = around if "messages" in values else {*around, "role"}  # one message of a conversation
    meant = {key for key in rest & (_MEANT | around) if not (key in ("weight", "train") and record[key] == 1)}
    return rest, meant


def _says(messages: object, text: object) -> bool:
    """Whether a text is the content of one of some messages."""
    said = messages if isinstance(messages, list) else []
    return any(isinstance(each, Mapping) and each.get("content") == text for each in said)


def _parsed(key: str, value: object) -> Any:
    """Return a list for its JSON, as tables hold it that know no lists."""
    if key not in _LISTS or not isinstance(value, str) or value.lstrip()[:2] not in ("[{", "[[", "[\n", "[ ", "[]"):
        return value
    may_be_text = key in ("chosen", "rejected", "prompt")
    try:
        found = parse_json(value, repr(key))
    except SpectuneError:
        if may_be_text:
            return value
        raise
    spoken = all(isinstance(each, Mapping) and each.keys() & {"role", "from"} for each in found)
    return value if may_be_text and not (found and spoken) else found


def _with_system(messages: list[Any], there: Values) -> tuple[list[Any], tuple[str, ...]]:
    for key in ("system", "system_prompt"):
        system = there.get(key)
        if isinstance(system, str):
            begins = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
            if begins and system and messages[0].get("content") != system:
                raise SpectuneError(f"has a system message and another one in {key!r}: keep one of them")
            return ([{"role": "system", "content": system}, *messages] if system and not begins else messages), (key,)
    return messages, ()


def _tools(there: Values) -> tuple[dict[str, object], tuple[str, ...]]:
    key = next((key for key in ("tools", "functions") if key in there), None)
    if key is None:
        return {}, ()
    tools = there[key]
    if isinstance(tools, list):
        tools = [
            tool if "function" in tool or key == "tools" else {"type": "function", "function": tool} for tool in tools
        ]
        tools = without_nulls(tools)
    return {"tools": tools or None}, (key,)


def _conversation(there: Values, task: str) -> Converted | None:
    key = next((key for key in ("messages", "conversations", "conversation", "contents") if key in there), None)
    if key is None:
        return None
    if key == "contents":
        return _contents(there, task)
    messages = as_messages(there[key])
    if messages is None:
        return None
    raw = there[key]
    name = "ShareGPT conversations" if key != "messages" or (raw and "from" in raw[0]) else "messages"
    messages, system = _with_system(messages, there)
    tools, named = _tools(there)
    read = (key, *system, *named)
    if task == "reinforce" and "prompt" not in there:
        last = max(
            (i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"), default=-1
        )
        return Converted({"prompt": messages[: last + 1], **tools}, name, None, read)
    if task == "dpo":
        return None
    return Converted({"messages": messages, **tools}, name, None, read)


def _contents(there: Values, task: str) -> Converted | None:
    """Recognise Gemini's conversations: contents, each with a role and parts, and an instruction beside them."""
    contents, read = there["contents"], ["contents"]
    if not isinstance(contents, list) or not all(isinstance(each, Mapping) and "parts" in each for each in contents):
        return None
    said = [{**{k: v for k, v in each.items() if k != "parts"}, "content": each["parts"]} for each in contents]
    key = next((key for key in ("systemInstruction", "system_instruction") if key in there), None)
    if key is not None and isinstance(there[key], Mapping):
        said, read = [{"role": "system", "content": there[key].get("parts")}, *said], [*read, key]
    found = _conversation({"messages": said}, task)
    return None if found is None else found._replace(format="contents with parts", read=tuple(read))


def _pair(there: Values, task: str) -> Converted | None:
    """Recognise a question and its answer, under the names that data sets have for them."""
    if "prompt" in there:
        return _prompted(there, task)
    asked = next((key for key in _ASKED if isinstance(there.get(key), str)), None)
    answered = next((key for key in _ANSWERED if isinstance(there.get(key), str) and key != asked), None)
    if asked is None or task == "dpo":
        return None
    if answered is None and task != "reinforce":
        other = next((key for key in _ANSWERED if key in there and key != asked), None)
        if other is None or "text" in there:
            return None
        raise SpectuneError(f"{other!r} must be a text, as {asked!r} is, and is {there[other]!r:.60}")
    context = next((k for k in _CONTEXT if k != asked and isinstance(there.get(k), str)), None)
    given = there[context].strip() if context is not None else ""
    question, answer = there[asked], there[answered] if answered is not None else ""
    alpaca = asked == "instruction" and answered == "output"
    if "text" in there and not alpaca and task != "reinforce":
        return None
    text = (f"{question}\n{given}" if asked == "instruction" else f"{given}\n\n{question}") if given else question
    turns: list[dict[str, str]] = []
    history = there.get("history") or []
    turns += as_messages(history) or []
    for pair in () if turns else history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise SpectuneError(
                f"'history' must be a list of pairs of texts, a question and its answer: {history!r:.60}"
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    system_turns, system = _with_system([*turns, {"role": "user", "content": text}], there)
    name = "Alpaca" if alpaca else f"{asked} and {answered}"
    read = tuple(key for key in (asked, answered, context, "history" if "history" in there else None) if key) + system
    if task == "reinforce":
        return Converted(
            {"prompt": system_turns if system or turns else text}, f"{asked} as the prompt", None, (asked, *system)
        )
    values = {"prompt": system_turns, "completion": [{"role": "assistant", "content": answer}]}
    said = "".join(f"{message['content']}\n\n" for message in system_turns[:-1])
    before = said + (_alpaca(question, given) if asked == "instruction" else f"Question: {text}\nAnswer:")
    plain = {"prompt": before, "completion": answer if asked == "instruction" else f" {answer}"}
    return Converted(values, name, plain, read)


def _alpaca(instruction: str, given: str) -> str:
    """Return the prompt that the Alpaca data was published with."""
    more = ", paired with an input that provides further context" if given else ""
    begin = f"Below is an instruction that describes a task{more}."
    begin += " Write a response that appropriately completes the request."
    return (
        f"{begin}\n\n### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{given}\n\n" if given else "")
        + "### Response:\n"
    )


def _prompted(there: Values, task: str) -> Converted | None:
    prompt = as_messages(there["prompt"]) or there["prompt"]
    if task == "reinforce":
        tools, named = _tools(there) if isinstance(prompt, list) else ({}, ())
        prompt, system = _with_system(prompt, there) if isinstance(prompt, list) else (prompt, ())
        return Converted({"prompt": prompt, **tools}, "prompts", None, ("prompt", *named, *system))
    key = next((key for key in ("completion", "response", "answer", "output") if key in there), None)
    if key is None or task == "dpo":
        return None
    completion = as_messages(there[key]) or there[key]
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list):
        prompt, system = _with_system(prompt, there)
        tools, named = _tools(there)
        return Converted(
            {"prompt": prompt, "completion": completion, **tools},
            f"prompt and {key}",
            None,
            ("prompt", key, *system, *named),
        )
    return Converted({"prompt": prompt, "completion": completion}, f"prompt and {key}", None, ("prompt", key))


def _preference(there: Values, task: str) -> Converted | None:
    if task == "dpo" and isinstance(there.get("completions"), list) and isinstance(there.get("instruction"), str):
        return _scored(there)
    if {"input", "preferred_output", "non_preferred_output"} <= there.keys():
        return _preferred(there, task)
    if not {"chosen", "rejected"} <= there.keys() or (
        task == "sft" and there.keys() & {"messages", "completion", "text"}
    ):
        return None
    chosen, rejected = (as_messages(there[key]) or there[key] for key in ("chosen", "rejected"))
    asked = next((key for key in ("prompt", "question", "instruction") if key in there), None)
    prompt = None if asked is None else as_messages(there[asked]) or there[asked]
    name, read = "preferences", tuple(key for key in ("chosen", "rejected", asked) if key)
    if isinstance(chosen, str) and isinstance(rejected, str) and chosen.startswith("\n\nHuman:") and prompt is None:
        spoken = _dialogue(chosen), _dialogue(rejected)
        if all(each is not None for each in spoken):
            (chosen, rejected), name = spoken, "preferences as dialogues of Human and Assistant"
    if isinstance(chosen, list) and isinstance(prompt, str):
        begins = bool(chosen) and isinstance(chosen[0], Mapping) and chosen[0].get("content") == prompt
        prompt = None if begins else [{"role": "user", "content": prompt}]
    system_there = isinstance(there.get("system"), str)
    if system_there and isinstance(chosen, str) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    if isinstance(prompt, list):
        prompt, system = _with_system(prompt, there)
        read += system
    values: dict[str, Any] = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
    if isinstance(chosen, list):
        tools, named = _tools(there)
        values, read = values | tools, read + named
    if task == "dpo":
        return Converted(values, name, None, read)
    if task != "sft":
        return None
    prompt, chosen, _ = parts_of(values)
    if isinstance(chosen, list):
        return Converted({"prompt": prompt, "completion": chosen}, f"{name}, of which 'chosen' is learned", None, read)
    return Converted({"prompt": prompt, "completion": chosen}, f"{name}, of which 'chosen' is learned", None, read)


def _preferred(there: Values, task: str) -> Converted | None:
    """Recognise OpenAI's preferences: an input of messages and tools, and two outputs."""
    asked = there["input"]
    if not isinstance(asked, Mapping) or "messages" not in asked:
        return None
    names = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    inner = {"prompt": asked["messages"], **{ours: there[theirs] for ours, theirs in names.items()}}
    found = _preference(inner | ({"tools": asked["tools"]} if asked.get("tools") else {}), task)
    return None if found is None else found._replace(read=("input", *names.values()))


def _scored(there: Values) -> Converted | None:
    """Recognise UltraFeedback as it was first published: completions of an instruction, each with a score."""

    def score(each: Values) -> float | None:
        found = next(
            (each[k] for k in ("overall_score", "fine-grained_score", "score") if each.get(k) is not None), None
        )
        return float(found) if isinstance(found, (int, float)) else None

    rated: list[tuple[float, str]] = []
    for each in there["completions"]:
        given = score(each) if isinstance(each, Mapping) else None
        if given is not None and isinstance(each.get("response"), str):
            rated.append((given, each["response"]))
    rated.sort(key=lambda pair: pair[0])
    if len(rated) < 2 or rated[0][0] == rated[-1][0]:
        return None
    values: dict[str, object] = {
        "prompt": [{"role": "user", "content": there["instruction"]}],
        "chosen": [{"role": "assistant", "content": rated[-1][1]}],
        "rejected": [{"role": "assistant", "content": rated[0][1]}],
    }
    return Converted(values, "scored completions, the best and the worst of each", None, ("instruction", "completions"))


def _unpaired(there: Values, task: str) -> Converted | None:
    """Recognise answers that are good or bad, each by itself."""
    key = next((key for key in ("label", "kto_tag") if key in there), None)
    if key is None or task not in ("sft", "kto") or (task == "sft" and not _is_bool(there[key])):
        return None
    found = _prompted(there, task) if {"prompt", "completion"} <= there.keys() else None
    if found is None:
        found = _conversation(there, task) or (_pair(there, task) if task == "kto" else None)
    if found is None:
        return None
    values = dict(found.values)
    if "messages" in values:
        *prompt, last = values.pop("messages") or [None]
        values |= {"prompt": prompt, "completion": [last]}
    chosen = ", of which those with label true are learned; task: kto learns from both" if task == "sft" else ""
    name = f"unpaired preferences{chosen}"
    values["label"] = says_yes(there[key]) if _is_bool(there[key]) else there[key]
    return found._replace(format=name, read=(*found.read, key), values=values)


def _is_bool(value: object) -> bool:
    """Whether a value is true or false, or a table's text for them."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _dialogue(text: str) -> list[dict[str, str]] | None:
    pieces = _HH.split(text)
    if pieces[0].strip() or len(pieces) < 5:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[r], "content": c.strip()} for r, c in zip(pieces[1::2], pieces[2::2], strict=True)]
    return turns if turns[-1]["role"] == "assistant" else None


def parts_of(record: Values) -> tuple[Any, Any, Any]:
    """Return the prompt and what follows it of both completions, which may have it, or share a beginning that is it."""
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if prompt is not None:
        size = len(prompt)
        repeated = size > 0 and all(size < len(text) and text[:size] == prompt for text in (chosen, rejected))
        return (prompt, chosen[size:], rejected[size:]) if repeated else (prompt, chosen, rejected)
    shared = _shared(chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Return how many messages, or characters of whole words, two conversations or texts begin with in common."""
    limit = min(len(chosen), len(rejected)) - 1
    same = in_common(chosen[:limit], rejected[:limit])
    return max(0, chosen.rfind(" ", 0, same + 1)) if isinstance(chosen, str) else max(0, same)

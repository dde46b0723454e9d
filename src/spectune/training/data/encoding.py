"""Examples: records tokenized so that what is learned is the answer and a stop, behind the prompt of inference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from spectune.bases.prompts import MARK, Ending, Message, ending, marked, plain, prompt_text, render, uses
from spectune.bases.tokens import (
    Asking,
    added_tokens,
    answered,
    answered_together,
    begun,
    continuing,
    end_of_text,
    first_added,
)
from spectune.errors import SpectuneError
from spectune.training.data.messages import FLAGS, check_calls, is_learned, other_fields
from spectune.training.data.records import Record, form, of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 512  # records whose texts are tokenized together
_NO_TEMPLATE = "the tokenizer has no chat template for 'messages'; use prompt and completion, or text"


Options = dict[str, Any]  # what a chat template is given beside the conversation


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
        notes: what a user should know of the way they were made.
    """

    examples: Sequence[Any]  # an Example each, or what else the task makes of a record
    cut: int
    dropped: int
    notes: tuple[str, ...] = field(default=())


class Encoder:
    """Records to examples.

    Each learned turn of the assistant is the prompt that inference builds for it (`spectune.bases.prompts`), followed
    by the tokens of what the chat template writes as its answer, and one stop.  A turn whose tokens the next one's
    prompt begins with becomes part of its example, so that a conversation is one example where the template writes
    earlier turns again as they were, and one a turn where it rewrites them.

    Args:
        tokenizer: the model's.
        ends: tokens that end the model's generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> None:
        self.tokenizer, self.ends = tokenizer, tuple(ends)
        self._ways: Counter[str] = Counter()
        self._unused: set[str] = set()
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._special_name = ""

    def examples(self, record: Record, everything: bool = False) -> list[Example]:
        """Return the examples of one record.

        Args:
            record: in one of the forms of `Sft`.
            everything: the loss is on every token.

        Raises:
            SpectuneError: messages without a chat template, or that it refuses.
        """
        return answered(self.tokenizer, self.asking(record, everything))

    def of_all(
        self, records: Iterable[Record], ask: Callable[[Record], Asking[list[Example]]] | None = None
    ) -> Iterator[list[Example]]:
        """Yield the examples of each of many records, whose texts the tokenizer gets some hundreds at a time.

        Args:
            records: the records.
            ask: what `asking` or a task makes of one; `asking` if not given.

        Raises:
            SpectuneError: as `examples`, with the record's place.
        """
        rest = iter(records)
        while part := [*islice(rest, _AT_ONCE)]:
            yield from answered_together(self.tokenizer, [self._placed(each, ask or self.asking) for each in part])

    def _placed(self, record: Record, ask: Callable[[Record], Asking[list[Example]]]) -> Asking[list[Example]]:
        with of(record):
            return (yield from ask(record))

    def asking(self, record: Record, everything: bool = False) -> Asking[list[Example]]:
        """Ask for tokens and return the examples of one record, as `examples` does."""
        kind = form(record)
        if kind == "text":
            tokens = self._ended(begun(self.tokenizer, (yield record["text"])))
            return [Example(tokens, [True] * len(tokens))]
        other = getattr(record, "plain", None)
        if other is not None and not getattr(self.tokenizer, "chat_template", None):
            self._ways["plain"] += 1
            return [(yield from self.completed(other["prompt"], other["completion"], everything))]
        options: Options = {key: record.get(key) for key in ("tools", "chat_template_kwargs")}
        if kind == "messages":
            return (yield from self.asking_turns(record["messages"], everything=everything, **options))
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list):
            return (yield from self.asking_turns([*prompt, *completion], len(prompt), everything=everything, **options))
        return [(yield from self.completed(prompt, completion, everything))]

    def one(self, record: Record) -> Example:
        """Return the one example of a record.

        Raises:
            SpectuneError: as `examples`; or there are several.
        """
        return answered(self.tokenizer, self.asking_one(record))

    def asking_one(self, record: Record) -> Asking[Example]:
        """Ask for tokens and return the one example of a record, as `one` does."""
        return _only((yield from self.asking(record)))

    def completed(self, prompt: str, completion: str, everything: bool = False) -> Asking[Example]:
        """Ask for and return a text prompt and its completion, with the end of text that is learned."""
        own = yield prompt
        before = begun(self.tokenizer, own)
        after = self._ended((yield from continuing(self.tokenizer, prompt, own, completion)))
        return Example([*before, *after], [everything] * len(before) + [True] * len(after))

    def _ended(self, tokens: list[int]) -> list[int]:
        """Return tokens with one end of text, which may be there already, with white space behind it."""
        end = end_of_text(self.tokenizer)
        last = len(tokens)
        while last > 0 and not str(self.tokenizer.decode(tokens[last - 1 : last])).strip():
            last -= 1
        return tokens if end is None or tokens[last - 1 : last] == [end] else [*tokens, end]

    def turns(self, messages: Sequence[Message], first: int = 0) -> list[Example]:
        """Return the examples of a conversation; the loss is on the assistant's turns from the `first` message on.

        Raises:
            SpectuneError: no chat template, or messages that it refuses, or leaves out.
        """
        return answered(self.tokenizer, self.asking_turns(messages, first))

    def asking_turns(
        self,
        messages: Sequence[Message],
        first: int = 0,
        *,
        tools: Sequence[object] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        everything: bool = False,
    ) -> Asking[list[Example]]:
        """Ask for tokens and return the examples of a conversation, as `turns` does.

        Args:
            messages: the conversation.
            first: the first message that may be learned.
            tools: of the conversation, for the chat template.
            chat_template_kwargs: other variables of the template.
            everything: the loss is on every token.

        Raises:
            SpectuneError: no chat template, or messages that it refuses, or leaves out.
        """
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise SpectuneError(_NO_TEMPLATE)
        chat = list(messages)
        self._watch(messages, tools)
        options: Options = {"tools": tools, "variables": chat_template_kwargs}
        whole = render(tokenizer, chat, **options)
        if everything:
            prompt_text(tokenizer, chat, **options)  # which checks that no message is left out
            if any(message.get(flag) in (0, False) for message in chat for flag in FLAGS):
                raise SpectuneError("a message is not to be learned, and completion_only: false learns every token")
            stop = ending(tokenizer, self.ends).stop
            tokens = [*(yield whole)]
            tokens += [] if stop is None or stop in tokens[-3:] else [stop]
            return [Example(tokens, [True] * len(tokens))]
        learned = [i for i, message in enumerate(messages) if i >= first and is_learned(message)]
        found: list[Example] = []
        for i in learned:
            turn = yield from self._turn(chat, i, options, whole if i + 1 == len(chat) else None)
            if found and turn.tokens[: len(found[-1].tokens)] == found[-1].tokens:
                before = found.pop().supervised
                turn = Example(turn.tokens, [*before, *turn.supervised[len(before) :]])
            found.append(turn)
        if found:  # what the template writes behind the last stop is seen, as it would be in a longer conversation
            last, tokens = found[-1], (yield whole)
            if tokens[: len(last.tokens)] == last.tokens:
                found[-1] = Example(tokens, last.supervised + [False] * (len(tokens) - len(last.tokens)))
        self._ways["turns"] += len(learned) > 1
        self._ways["split"] += len(found) > 1
        self._ways["parts"] += len(found) if len(found) > 1 else 0
        return found

    def _turn(self, chat: Sequence[Message], i: int, options: Options, whole: str | None) -> Asking[Example]:
        """Ask for and return the prompt of an assistant's message, and its answer with a stop."""
        tokenizer = self.tokenizer
        prompt = prompt_text(tokenizer, chat[:i], **options)
        whole = render(tokenizer, chat[: i + 1], **options) if whole is None else whole
        end = ending(tokenizer, self.ends)
        pieces, stop = self._parts(chat, i, prompt, whole, end, options)
        check_calls(chat[i], "".join(text for text, _ in pieces))
        tokens = yield prompt
        supervised = [False] * len(tokens)
        before = prompt
        for text, is_answer in pieces:
            more = yield from continuing(tokenizer, before, tokens, text)
            before, tokens = before + text, [*tokens, *more]
            supervised += [is_answer] * len(more)
        if stop is not None:
            tokens, supervised = [*tokens, stop], [*supervised, True]
        self._ways["stop"] += 1
        self._ways["unstopped"] += stop is None
        self._ways["foreign"] += stop is not None and not end.own
        return Example(tokens, supervised)

    def _parts(
        self, chat: Sequence[Message], i: int, prompt: str, whole: str, end: Ending, options: Options
    ) -> tuple[list[tuple[str, bool]], int | None]:
        """Return what a template writes behind a prompt, in pieces that are learned or not, and the stop."""
        tokenizer = self.tokenizer
        if whole.startswith(prompt):
            start, spans = len(prompt), marked(tokenizer, chat[: i + 1], **options)
            rest = whole[start:]
        else:  # the template writes something else in place of its own generation prompt
            rest, spans = self._rewritten(chat, i, prompt, whole, options), None
            start = 0
        answer, gap, stop = rest.removesuffix(end.suffix), end.gap, end.stop
        if not rest.endswith(end.suffix) or not end.suffix:
            answer, gap, stop = self._ended_otherwise(rest, chat, i, whole, end, options)
        if stop is not None:
            name = str(tokenizer.convert_ids_to_tokens(stop))
            while answer.rstrip().endswith(name):  # the data has the stop too
                answer = answer.rstrip().removesuffix(name)
        if spans is None:
            return [(answer, True), (gap, stop is not None)], stop
        self._ways["marks"] += 1
        spans = [(max(0, a - start), b - start) for a, b in spans if b > start]
        if not spans:
            return [(rest, False)], None  # the template says that this turn is not learned
        a, b = spans[0][0], spans[-1][1]
        within = b >= len(answer + gap) and stop is not None
        return [(answer[:a], False), (answer[a:b], True), (answer[b:], False), (gap, within)], stop

    def _ended_otherwise(
        self, rest: str, chat: Sequence[Message], i: int, whole: str, end: Ending, options: Options
    ) -> tuple[str, str, int | None]:
        """Return the answer, gap and stop of a turn that does not end as an answer without calls does."""
        bare = rest.rstrip()
        start, until, stop = next(reversed(added_tokens(self.tokenizer, bare)), (0, -1, None))
        if until == len(bare) and (end.suffix or stop in (*self.ends, end_of_text(self.tokenizer))):
            return bare[:start], "", stop
        if i + 1 < len(chat):  # what the next turn begins with may be the stop
            after = render(self.tokenizer, chat[: i + 2], **options)
            gap, stop = first_added(self.tokenizer, after[len(whole) :]) if after.startswith(whole) else ("", None)
            if stop in self.ends and not gap.strip():
                return rest, gap, stop
        return rest, end.gap, end.stop

    def _rewritten(self, chat: Sequence[Message], i: int, prompt: str, whole: str, options: Options) -> str:
        """Return what follows a prompt that the template does not write when the answer is there."""
        (message,) = plain(chat[i : i + 1])
        shown = render(self.tokenizer, [*chat[:i], {**message, "content": MARK}], **options)
        header, mark, _ = shown.partition(MARK)
        if not mark or not whole.startswith(header):
            raise SpectuneError("the chat template writes an answer otherwise than behind its own generation prompt")
        rest = whole[len(header) :]
        if not prompt.rstrip().endswith("<think>"):
            return rest
        thought, content = message.get("reasoning_content") or message.get("thinking") or "", message["content"]
        if not thought and "</think>" in content:  # which templates of this kind leave out
            thought = content.partition("</think>")[0].replace("<think>", "")
            rest = rest.rpartition("</think>")[2].lstrip("\n")
        thought = thought.strip("\n")
        return f"{thought}\n</think>\n\n{rest}"

    def _watch(self, messages: Sequence[Message], tools: Sequence[object] | None) -> None:
        names = other_fields(messages) | ({"tools"} if tools else set())
        self._unused |= {name for name in names if not uses(self.tokenizer, name)}
        found = [self._special.search(content) for m in messages if isinstance(content := m.get("content"), str)]
        name = next((match[0] for match in found if match is not None), None)
        if name is not None:
            self._ways["special"] += 1
            self._special_name = self._special_name or name

    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the way in which records became examples."""
        ways, notes = self._ways, []
        if ways["marks"]:
            notes.append("the loss is on what the chat template marks with {% generation %}")
        if ways["split"]:
            notes.append(
                f"the chat template writes earlier turns otherwise: {ways['split']} conversations became "
                f"{ways['parts']} examples, one a turn, each behind the prompt that inference builds"
            )
        elif ways["turns"]:
            notes.append("the chat template keeps earlier turns as they were: each conversation is one example")
        if ways["plain"]:
            notes.append(
                "the tokenizer has no chat template: instructions are written as the Alpaca data was published"
            )
        if ways["unstopped"]:
            notes.append("nothing ends an answer: neither the chat template nor the tokenizer has an end token")
        if ways["foreign"]:
            notes.append(
                f"the chat template ends answers with no token: {self.tokenizer.eos_token} is put behind each of them"
            )
        if ways["special"]:
            notes.append(
                f"{self._special_name} stands as text in messages ({ways['special']} of the conversations) and is read "
                "as the special token: what follows it may count as another's turn"
            )
        if self._unused:
            notes.append(f"not read by the chat template: {', '.join(sorted(self._unused))}")
        return tuple(notes)


def _only(examples: list[Example]) -> Example:
    if len(examples) != 1:
        raise SpectuneError(
            f"the chat template rewrites earlier turns, so that this conversation is {len(examples)} examples and not "
            "one: give all but the last answer as the prompt"
        )
    return examples[0]


def encode_one(record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize one record that is one example.

    Raises:
        SpectuneError: as `Encoder.one`.
    """
    return Encoder(tokenizer).one(record)


def encode_turns(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, first: int = 0) -> Example:
    """Tokenize a conversation that is one example; the loss is on the assistant's turns from the `first` message on.

    Raises:
        SpectuneError: as `Encoder.one`.
    """
    return _only(Encoder(tokenizer).turns(messages, first))

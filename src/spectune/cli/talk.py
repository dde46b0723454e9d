"""A conversation with a model and its adapters, and the commands within it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TextStreamer

from spectune.bases import generation
from spectune.cli.shared import decision_text
from spectune.errors import SpectuneError, nearest
from spectune.layers.merged import active_adapters
from spectune.layers.whole import parts_of
from spectune.model.routing import activate
from spectune.transformer2.two_pass import Transformer2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HELP = """/base            the model without adapters answers
/adapter         the adapters answer, as at the start
/both            both answer, one below the other; the adapters' answer is remembered
/mix NAME W ...  adapters by name with weights: /mix pirate 0.5 chef 0.5
/history         the conversation so far
/save FILE       write it, as a line of data for `spectune train`
/reset           begin anew
/quit            end"""


class Talk:
    """One conversation.

    Args:
        model: with adapters that are active, or none.
        tokenizer: its tokenizer.
        system: a system message.
        settings: of generation.
        console: for everything but replies.
        two: chooses among a library's adapters, where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None,
        settings: dict[str, Any],
        console: Console,
        two: Transformer2 | None = None,
    ) -> None:
        self._model, self._tokenizer, self._settings, self._console, self._two = (
            model,
            tokenizer,
            settings,
            console,
            two,
        )
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = list(self._start)
        self._at_first = _active(model) if two is None else {}
        self._names = _typed(list(self._at_first))
        self._choice: dict[str, float] | None = None  # what is active already
        self._both = self._base = False

    def hear(self, line: str) -> None:
        """Answer what was typed, or do what it asks for.

        Raises:
            SpectuneError: a command that is not known or not understood, or a prompt that cannot be answered.
        """
        if not line:
            return
        if not line.startswith("/"):
            self._answer(line)
            return
        word, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._console.print(_HELP, markup=False),
            "base": lambda _: self._choose(None, base=True),
            "adapter": lambda _: self._choose(self._at_first),
            "both": lambda _: self._choose(self._choice or self._at_first, both=True),
            "mix": self._mix,
            "history": lambda _: self._history(),
            "save": self._save,
            "reset": lambda _: self._reset(),
        }
        if word not in commands:
            raise SpectuneError(f"there is no /{word}{nearest(word, [*commands, 'quit'])} (/help names them all)")
        commands[word](rest.strip())

    def _choose(self, weights: dict[str, float] | None, *, base: bool = False, both: bool = False) -> None:
        if self._two is not None:
            raise SpectuneError("a library chooses for each prompt: /base, /adapter, /both and /mix go with -a")
        if not self._names:
            raise SpectuneError("there is no adapter here: give one with -a, or name a run's folder")
        self._choice, self._base, self._both = weights or self._choice, base, both
        self._activate(None if base else self._choice or self._at_first)

    def _activate(self, choice: dict[str, float] | None) -> None:
        activate(self._model, choice)

    def _mix(self, text: str) -> None:
        words = text.replace(":", " ").split()
        weights: dict[str, float] = {}
        for name, weight in zip(words[::2], words[1::2], strict=False):
            if name not in self._names:
                raise SpectuneError(f"no adapter here is named {name!r}{nearest(name, self._names)}")
            try:
                weights[self._names[name]] = float(weight)
            except ValueError:
                raise SpectuneError(f"{weight!r} is no weight: /mix {name} 0.5") from None
        if not weights or len(words) % 2:
            known = " ".join(f"{name} 0.5" for name in self._names) or "NAME 0.5"
            raise SpectuneError(f"/mix takes names with weights: /mix {known}")
        self._choose(weights)

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            if self._both:
                self._activate(None)
                self._console.print("base:", style="dim")
                self._reply()
                self._activate(self._choice or self._at_first)
                self._console.print("adapter:", style="dim")
            said = self._reply()
        except SpectuneError:
            self._messages.pop()
            raise
        finally:
            if self._both:
                self._activate(self._choice or self._at_first)
        self._messages.append({"role": "assistant", "content": said})

    def _reply(self) -> str:
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self._two is None:
            found = generation.generate(
                self._model, self._tokenizer, [self._messages], **self._settings, streamer=streamer
            )
        else:
            decisions = self._two.choose([self._messages])
            self._console.print(f"[{decision_text(decisions[0])}]", style="dim", markup=False)
            found = self._two.generate([self._messages], decisions=decisions, **self._settings, streamer=streamer)
        return found[0].text

    def _history(self) -> None:
        for message in self._messages:
            sys.stdout.write(f"{message['role']}: {message['content']}\n")

    def _save(self, place: str) -> None:
        if not place:
            raise SpectuneError("/save takes a file: /save talk.jsonl")
        with Path(place).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self._messages}, ensure_ascii=False) + "\n")
        self._console.print(f"added to {place}", markup=False, soft_wrap=True)

    def _reset(self) -> None:
        self._messages = list(self._start)


def _active(model: PreTrainedModel) -> dict[str, float]:
    """Return the adapters that answer, by their names on the model, with their weights."""
    found: dict[str, float] = {}
    for part in parts_of(model).values():
        found |= dict(active_adapters(part))
    return found


def _typed(names: list[str]) -> dict[str, str]:
    """Return names on the model by what a user calls them, which are numbered where two are alike."""
    short = {name: re.sub(r"-\d+$", "", name.removeprefix("a-")) for name in names}
    alike = len(set(short.values())) < len(names)
    return {name.removeprefix("a-") if alike else short[name]: name for name in names}

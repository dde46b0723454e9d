"""Rewards: a function by name, called on a batch of completions, with every answer of it checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np

from spectune.bases.prompts import Message
from spectune.errors import SpectuneError, nearest
from spectune.plugins import imported, where
from spectune.training.data.records import Record

Function = Callable[..., Sequence[float]]


class RewardError(SpectuneError):
    """A reward function failed on a batch."""


class Reward:
    """A reward function with its name; TRL's reward functions are of this form.

    The function is called as `function(prompts=..., completions=..., column=...)` with the lists of those that it
    takes: a prompt, a completion, and every column of the data; a completion is text, which where the prompt is
    messages `completion[0]["content"]` reads as well.  It returns a number for each completion, or None where it has
    nothing to say.

    Args:
        name: for messages.
        function: the function.
    """

    def __init__(self, name: str, function: Function) -> None:
        self.name = name
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in named}
        self._needs = [p.name for p in named if p.default is p.empty]

    def check_columns(self, records: Sequence[Record]) -> None:
        """Raise where the function takes what the data has not.

        Raises:
            SpectuneError: the parameter is named.
        """
        there = {"prompts", "completions"}.union(*(record.keys() - {"prompt"} for record in records))
        for name in self._needs:
            if name not in there:
                raise SpectuneError(
                    f"the reward {self.name} takes {name!r}, which is no column of the data{nearest(name, there)} "
                    f"(there: {', '.join(sorted(there))})"
                )

    def __call__(self, records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        """Return the reward of each completion of the record beside it.

        Raises:
            RewardError: the function raised, or what it returned is not one finite number for each completion.
        """
        columns = {key: None for record in records for key in record if key != "prompt"}
        values: dict[str, object] = {name: [record.get(name) for record in records] for name in columns}
        values |= {"prompts": [record["prompt"] for record in records]}
        values |= {"completions": [_as_asked(c, r["prompt"]) for c, r in zip(completions, records, strict=True)]}
        taken = values if self._takes is None else {k: v for k, v in values.items() if k in self._takes}
        try:
            returned = self._function(**taken)
        except Exception as error:  # whatever a user's function raises
            raise RewardError(
                f"the reward {self.name} raised {type(error).__name__}: {error}{where(error)}; it got "
                f"{len(completions)} completions, the first {completions[0]!r}"
            ) from error
        return self._checked(returned, completions)

    def _checked(self, returned: Any, completions: Sequence[str]) -> list[float]:
        asked = f"it must return a list of {len(completions)} finite numbers, one for each completion"
        shape = getattr(returned, "shape", None)
        if shape is not None and len(shape) == 1:
            returned = returned.tolist()
        if not isinstance(returned, (list, tuple)):
            what = type(returned).__name__ + (f" of shape {tuple(shape)}" if shape else "")
            raise RewardError(f"the reward {self.name} returned a {what}; {asked}")
        if len(returned) != len(completions):
            raise RewardError(f"the reward {self.name} returned {len(returned)} values; {asked}")
        if all(value is None for value in returned):
            raise RewardError(f"the reward {self.name} gave None for every completion; {asked}")
        for value, completion in zip(returned, completions, strict=True):
            number = value is None or isinstance(value, (Real, np.bool_)) or getattr(value, "shape", None) == ()
            if not number or (value is not None and not math.isfinite(value)):
                raise RewardError(f"the reward {self.name} gave {value!r} for the completion {completion!r}; {asked}")
        return [0.0 if value is None else float(value) for value in returned]


class Rewards(Reward):
    """The weighted sum of several rewards.

    Args:
        rewards: each.
        weights: of each; 1 if not given.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        self.name = " + ".join(reward.name for reward in rewards)
        self._rewards, self._weights = list(rewards), list(weights or [1.0] * len(rewards))

    def check_columns(self, records: Sequence[Record]) -> None:
        for reward in self._rewards:
            reward.check_columns(records)

    def __call__(self, records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        each = [reward(records, completions) for reward in self._rewards]
        return [sum(w * r for w, r in zip(self._weights, row, strict=True)) for row in zip(*each, strict=True)]


def load_rewards(names: str | Sequence[str], weights: Sequence[float] | None = None) -> Reward:
    """Import one reward or several, which are added with their weights.

    Raises:
        SpectuneError: as `load_reward`.
    """
    found = [load_reward(name) for name in ([names] if isinstance(names, str) else names)]
    return found[0] if len(found) == 1 and not weights else Rewards(found, weights)


class Said(str):
    """A completion of a conversation: its text, which is also read as TRL's list of one message.

    `completion[0]["content"]` is the text, and everything that a text has stays as it is.
    """

    def __getitem__(self, key: Any) -> object:
        if key in (0, -1) and not isinstance(key, slice):
            return _Begun(super().__getitem__(slice(key, None) if key else slice(0, 1)), self)
        return super().__getitem__(key)


class _Begun(str):
    """A character of a completion, and the message that this is."""

    _said: str

    def __new__(cls, text: str, said: str) -> _Begun:
        made = super().__new__(cls, text)
        made._said = said
        return made

    def __getitem__(self, key: Any) -> object:
        if isinstance(key, str):
            return {"role": "assistant", "content": str(self._said)}[key]
        return super().__getitem__(key)


def _as_asked(completion: str, prompt: str | Sequence[Message]) -> str | list[dict[str, str]]:
    return completion if isinstance(prompt, str) else Said(completion)


def load_reward(name: str) -> Reward:
    """Import the reward `module:function`, from the working directory or from what is installed.

    Raises:
        SpectuneError: no such module or function, or what is there is not a function.
    """
    found = imported(name, "reward", "function, such as rewards:exact for a rewards.py here")
    if not callable(found):
        raise SpectuneError(f"reward {name!r} is a {type(found).__name__}, not a function")
    return Reward(name, cast(Function, found))

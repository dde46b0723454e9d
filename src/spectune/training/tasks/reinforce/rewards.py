"""Rewards: a function by name, called on a batch of completions, with every answer of it checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from spectune.errors import SpectuneError, nearest
from spectune.plugins import imported, where
from spectune.training.data.records import Record

Function = Callable[..., Sequence[float]]


class RewardError(SpectuneError):
    """A reward function failed on a batch."""


class Reward:
    """A reward function with its name; TRL's reward functions are of this form.

    The function is called as `function(prompts=..., completions=..., column=...)` with the lists of those that it
    takes: a prompt, a completion as text, and every column of the data; it returns a number for each completion.

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
        values: dict[str, Any] = {name: [record.get(name) for record in records] for name in columns}
        values |= {"prompts": [record["prompt"] for record in records], "completions": list(completions)}
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
        for value, completion in zip(returned, completions, strict=True):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise RewardError(f"the reward {self.name} gave {value!r} for the completion {completion!r}; {asked}")
        return [float(value) for value in returned]


def load_reward(name: str) -> Reward:
    """Import the reward `module:function`, from the working directory or from what is installed.

    Raises:
        SpectuneError: no such module or function, or what is there is not a function.
    """
    found = imported(name, "reward", "function, such as rewards:exact for a rewards.py here")
    if not callable(found):
        raise SpectuneError(f"reward {name!r} is a {type(found).__name__}, not a function")
    function: Any = found
    return Reward(name, function)

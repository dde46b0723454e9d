"""Problems and rewards of a reasoning-gym environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spectune.errors import SpectuneError, nearest
from spectune.training.data.records import Record

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

_DRAWS = 4  # problems drawn for each that is wanted, before an environment counts as exhausted


class Environment:
    """A reasoning-gym environment: seeded problems, no question twice, and the environment's own score of a reply.

    Args:
        name: such as "chain_sum".
        options: of the environment, such as {"max_terms": 2}.
        count: problems that are wanted; a small environment may have fewer.
        seed: of the problems.

    Raises:
        SpectuneError: reasoning-gym is not installed, or an unknown environment or option (the nearest is named), or
            a value that the environment does not take.
    """

    def __init__(self, name: str, options: Mapping[str, object], count: int, seed: int = 0) -> None:
        self.name = name
        self._count = count
        self._data = _create(name, options, size=_DRAWS * count, seed=seed)

    def records(self) -> list[Record]:
        """Return the problems, with the keys `prompt`, `answer` and `index`, which is the environment's."""
        found: dict[str, Record] = {}  # by question
        for index in range(_DRAWS * self._count):
            entry = self._data[index]
            question, answer = str(entry["question"]), str(entry["answer"])
            found.setdefault(question, {"prompt": question, "answer": answer, "index": index})
            if len(found) == self._count:
                break
        return list(found.values())

    def score(self, completions: Sequence[str], index: Sequence[int]) -> list[float]:
        """Return the environment's score, from 0 to 1, of a completion for each of these problems."""
        return [
            self._data.score_answer(completion, self._data[i]) for completion, i in zip(completions, index, strict=True)
        ]


def _create(name: str, options: Mapping[str, object], **own: int) -> ProceduralDataset:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise SpectuneError("environments come from the package reasoning-gym: pip install 'spectune[rl]'") from None
    if name not in DATASETS:
        raise SpectuneError(
            f"unknown environment {name!r}{nearest(name, DATASETS)} (reasoning-gym has {len(DATASETS)}: "
            "python -c 'import reasoning_gym.factory as f; print(*f.DATASETS)')"
        )
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - own.keys()
    for key in options:
        if key not in known:
            raise SpectuneError(
                f"environment_options: {name} has no option {key!r}{nearest(str(key), known)} "
                f"(known: {', '.join(sorted(known)) or 'none'})"
            )
    try:
        return reasoning_gym.create_dataset(name, **options, **own)
    except (AssertionError, TypeError, ValueError) as error:
        raise SpectuneError(f"environment_options: {name} does not take {dict(options)}: {error}") from None

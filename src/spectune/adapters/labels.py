"""What a classifier's logits stand for, and how they are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing only from Python 3.11 on

# transformers' names, of its configurations' `problem_type`
ONE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (ONE, SEVERAL, NUMBER)


class Labels(tuple[str, ...]):
    """What a classifier's logits stand for, in their order.

    Args:
        names: one for each logit.
        problem: how logits are read: as one of the labels (softmax), as any of them (a sigmoid each), or as a number;
            one name alone is a number, as transformers has it.
    """

    problem: str

    def __new__(cls, names: Iterable[str], problem: str | None = None) -> Self:
        made = super().__new__(cls, names)
        made.problem = NUMBER if len(made) == 1 else problem or ONE
        return made

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other and self.problem == getattr(other, "problem", self.problem)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

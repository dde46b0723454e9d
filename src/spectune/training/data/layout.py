"""Where the tokens of examples lie in a packed row; what several begin with lies there once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectune.training.data.common import in_common
from spectune.training.data.encoding import Example

_WORTH = 8  # tokens in common that are computed once; longer examples need more,
_SQUARE = (
    1 << 13
)  # the square of their length over this: a mask takes twice the arithmetic of attention to one's own rows


class Layout:
    """How examples lie in a row of tokens.

    Args:
        examples: in any order.
        share: whether an example takes the rows of another one for the tokens that both begin with; it then lies
            behind those that come before it in the order of their tokens, of which the last has most in common with it.

    Attributes:
        order: of the examples in the row.
        rows: for each example, in the order given, the rows of its tokens.
        own: for each example, in the order of the row, how many of them are its own; they are its last ones.
        seen: the same of all of them.
        count: of the rows.
    """

    def __init__(self, examples: Sequence[Example], share: bool) -> None:
        numbers = range(len(examples))
        # sorted by tokens, neighbours have the longest beginnings in common: what a tree of prefixes would find, in one
        # pass
        self.order = sorted(numbers, key=lambda i: examples[i].tokens) if share else [*numbers]
        self.rows: list[list[int]] = [[]] * len(examples)
        self.own: list[int] = []
        self.seen = [len(examples[index].tokens) for index in self.order]
        self.count, last = 0, 0
        for index, seen in zip(self.order, self.seen, strict=True):
            # at least one token of its own, or the example would have no row whose logits are its
            common = in_common(examples[last].tokens, examples[index].tokens[:-1]) if share and self.own else 0
            common = common if common >= max(_WORTH, seen**2 // _SQUARE) else 0
            end = self.count + seen - common
            self.rows[index] = [*self.rows[last][:common], *range(self.count, end)]
            self.own.append(seen - common)
            self.count, last = end, index

    def mask(self, dtype: torch.dtype | None) -> Tensor:
        """Return what each row attends to (1 x 1 x count x count): True, or 0 in a dtype."""
        mask = torch.zeros(self.count, self.count, dtype=torch.bool)
        for index, own, seen in zip(self.order, self.own, self.seen, strict=True):
            start, end = self.rows[index][-own], self.rows[index][-1] + 1
            # its rows see what the last shared row sees, which is all of the beginning, wherever in the row that lies
            if own < seen:
                mask[start:end] = mask[self.rows[index][seen - own - 1]]
            mask[start:end, start:end] = torch.ones(own, own, dtype=torch.bool).tril()
        if dtype is not None:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        return mask[None, None]

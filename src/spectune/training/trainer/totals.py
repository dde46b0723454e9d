"""What an evaluation adds up over batches and processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from spectune.training import processes


class Totals:
    """Sums of a task over batches, and what is laid end to end instead.

    Args:
        gathered: the keys of the latter.
    """

    def __init__(self, gathered: Collection[str] = ()) -> None:
        self._gathered = gathered
        self._sums: dict[str, Tensor] = {}
        self._rows: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add what a batch has."""
        for key, value in sums.items():
            if key in self._gathered:
                self._rows[key].append(value.cpu())
            else:
                self._sums[key] = self._sums[key] + value if key in self._sums else value

    def of_all(self, reduced: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Tensor]:
        """Return the sums over all processes, and the rows of all of them.

        Args:
            reduced: adds a tensor up over processes.
        """
        found = {key: reduced(value) for key, value in self._sums.items()}
        rows = {key: torch.cat(parts) for key, parts in self._rows.items()}
        return found | {key: torch.cat(processes.gather(part)) for key, part in rows.items()}

"""Records that a short run needs: a few steps do not wait for the tokens of records that they never reach."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from spectune.training.config import TrainConfig
from spectune.training.data.encoding import Encoded
from spectune.training.data.records import Record

_GROUP = 50  # steps within which examples are ordered by length, as transformers has it


class Drawn(list[Any]):
    """Examples in the order in which they are trained on, which is as long as the run."""


def encode_needed(
    config: TrainConfig,
    records: Sequence[Record],
    encode: Callable[[Sequence[Record]], Encoded],
    *,
    by_length: bool = False,
    processes: int = 1,
) -> Encoded:
    """Return the examples of records; where `max_steps` reach less than half of them, of those alone, in a drawn order.

    The order is the same for any `max_steps`, so that a run that is resumed for more of them goes on with the next.

    Args:
        config: of the run.
        records: all that it may learn from.
        encode: makes examples of some.
        by_length: batches are of examples of about one length.
        processes: that share a step.
    """
    each = config.batch_size * config.gradient_accumulation_steps * processes
    needed = (config.max_steps or 0) * each
    group = each * _GROUP if by_length else each
    take = -(-needed // group) * group
    if not needed or 2 * take >= len(records):
        return encode(records)
    order = list(range(len(records)))
    random.Random(config.seed).shuffle(order)
    while True:
        found = encode([records[i] for i in order[:take]])
        if len(found.examples) >= needed or take >= len(records):
            break
        take *= 2  # some had nothing to learn from
    examples = Drawn(found.examples)
    if by_length:
        for start in range(0, len(examples), group):
            examples[start : start + group] = sorted(
                examples[start : start + group], key=lambda example: -len(example["input_ids"])
            )
    note = f"{config.max_steps:,} steps take {needed:,} of {len(records):,} records, drawn at random by the seed"
    return replace(found, examples=examples, notes=(*found.notes, note))

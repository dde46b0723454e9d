"""Records taken apart: a share held out, as often as their weights say, and which of them are copies."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from spectune.errors import SpectuneError
from spectune.training.data.rows import Record, same
from spectune.training.data.spool import Spooled


def split(
    records: Sequence[Record], share: float, seed: int, by: Callable[[Record], object] | None = None
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Return records for training and a held-out share of them, at least one, at random by the seed.

    Records that are the same stay together, so that none is in both.

    Args:
        records: all of them.
        share: of them that is held out.
        seed: of the choice.
        by: what the share is the same of, such as a label; each value that several records have stays in both parts as
            far as it can, and every value in the first.

    Raises:
        SpectuneError: one of the two would be empty.
    """
    if share <= 0:
        return records, []
    wanted = max(1, round(len(records) * share))
    if wanted >= len(records):
        raise SpectuneError(
            f"held_out={share} of {len(records)} examples leaves one side empty; give more data, another share, or 0"
        )
    if isinstance(records, Spooled):
        return records.parted(wanted, seed)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        groups[same(record)].append(i)
    kinds = [None if by is None else by(record) for record in records]
    out = set(_chosen([*groups.values()], kinds, wanted, seed))
    if not out:  # no more than one record of each kind is another one, so that copies are on both sides, which is told
        out = set(_chosen([[i] for i in range(len(records))], kinds, wanted, seed))
    if not out:
        raise SpectuneError(
            f"held_out={share}: each label is there once, so that none can be held out; give eval_data, more data, or "
            "held_out=0"
        )
    return [r for i, r in enumerate(records) if i not in out], [records[i] for i in sorted(out)]


def _chosen(groups: list[list[int]], kinds: Sequence[object], wanted: int, seed: int) -> list[int]:
    """Return about as many as are wanted, whole groups, as many of every kind as it has, but never all of it."""
    random.Random(seed).shuffle(groups)
    strata: dict[object, list[list[int]]] = defaultdict(list)
    for group in groups:
        strata[kinds[group[0]]].append(group)
    quotas = {kind: wanted * sum(map(len, members)) / len(kinds) for kind, members in strata.items()}
    held: list[int] = []
    taken: Counter[object] = Counter()
    while len(held) < wanted:
        able = [kind for kind, members in strata.items() if len(members) > 1]  # one at least is learned
        if not able:
            break
        kind = max(able, key=lambda kind: quotas[kind] - taken[kind])
        group = strata[kind].pop()
        if held and len(held) + len(group) > wanted + max(1, wanted // 2):  # many copies of one record
            continue
        taken[kind] += len(group)
        held += group
    return held


def repeated(records: Sequence[Record], seed: int) -> Sequence[Record]:
    """Return records as often as their weights say; what is left of a weight is drawn by the seed."""
    if isinstance(records, Spooled):
        return records.repeated(seed)
    draws, found = random.Random(seed), []
    for record in records:
        weight = getattr(record, "weight", 1.0)
        found += [record] * (int(weight) + (draws.random() < weight % 1))
    return found


def copies(records: Sequence[Record], others: Sequence[Record]) -> tuple[int, int]:
    """Return how many records are there more than once, and how many of the others are among them."""
    if isinstance(records, Spooled) and isinstance(others, Spooled):
        kinds = np.unique(records.digests())
        return len(records) - len(kinds), int(np.isin(others.digests(), kinds).sum())
    learned = {same(record) for record in records}
    return len(records) - len(learned), sum(same(record) in learned for record in others)

"""Records: read from files and data sets, in the forms that tasks take, checked, and split."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from spectune.errors import SpectuneError, nearest
from spectune.training.data.files import rows
from spectune.training.data.formats import convert, unread

if TYPE_CHECKING:
    from spectune.training.config import Source, TrainConfig


Record = Mapping[str, Any]  # one line of data, read from JSON or a table
_OF_TASKS = {"text", "label", "text_pair", "prompt", "completion", "messages", "chosen", "rejected", "tools"}


class Row(dict[str, Any]):
    """A record that knows where it comes from.

    Args:
        values: its keys.
        where: file and line, for messages.
        plain: the same as a text prompt and completion, for tokenizers without a chat template.
        weight: how often it is taken, where others are taken once.
    """

    def __init__(self, values: Mapping[str, object], where: str, plain: Mapping[str, str] | None = None) -> None:
        super().__init__(values)
        self.where, self.plain, self.weight = where, plain, 1.0
        self.same: str | None = None  # as `same` has it, once it was asked for


@contextmanager
def of(record: Record) -> Iterator[None]:
    """Within the context, a `SpectuneError` says which record it is about."""
    try:
        yield
    except SpectuneError as error:
        where = getattr(record, "where", None)
        raise (SpectuneError(f"{where}: {error}") if where else error) from None


class Form(Protocol):
    """What reading asks of a task."""

    forms: ClassVar[str]  # the keys of a record, for messages

    @property
    def config(self) -> TrainConfig:
        """The run's configuration: `columns`, the task's names for those of the data, and `task`."""
        ...

    def problem(self, record: Record) -> str | None:
        """Return what is wrong with the form of a record, or None."""
        ...


def read(
    source: str | Path | list[str | Source],
    task: Form,
    config_name: str | None = None,
    split_name: str | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> list[Record]:
    """Read the records of a file, of several, or of a split of a data set, in the form that a task takes.

    Args:
        source: a file (JSON, JSONL, CSV, TSV, Parquet, packed or not), a pattern, or a data set's folder or id; or a
            list of these and of objects with path, weight, config and split.
        task: which says what each record must look like.
        config_name: of the data set, where it has several configurations.
        split_name: of the data set; train if not given.
        say: told what a user should know of the way the data was read.

    Raises:
        SpectuneError: what cannot be read, or a record of another form, with its place.
    """
    if isinstance(source, (list, tuple)):
        records: list[Record] = []
        for part in source:
            given = part if isinstance(part, str) else part.path
            own = (config_name, split_name) if isinstance(part, str) else (part.config, part.split)
            found = read(given, task, *own, say)
            for record in found:
                cast(Row, record).weight = 1.0 if isinstance(part, str) else part.weight
            say(f"{given}: {len(found)} records")
            records += found
        return records
    records, formats, fields, blank = [], Counter(), Counter(), []
    for values, where in rows(str(source), config_name, split_name, say):
        if not isinstance(values, dict):
            raise SpectuneError(f"{where}: not a JSON object with {task.forms}")
        values = _renamed(values, task)
        converted = convert(values, task.config.task)
        if converted.format.startswith("unpaired") and not converted.values.pop("label"):
            formats["left out, for their label is false"] += 1
            continue
        problem = task.problem(converted.values)
        if problem is not None:
            raise SpectuneError(f"{where}: {problem}")
        if _is_blank(converted.values, task):
            blank.append(where)
            continue
        formats[converted.format] += 1
        if task.config.task != "classify" and task.config.task != "reinforce":
            others, meant = unread(converted, values)
            if meant:
                name = min(meant)
                raise SpectuneError(
                    f"{where}: has {name!r}, which would change what is learned, and nothing reads it beside "
                    f"{_shape(converted.values)}: take it out, or put it into messages"
                )
            fields.update(others)
        records.append(Row(converted.values, where, converted.plain))
    if not records:
        why = f", for {blank[0]} and all others have a text without content" if blank else ""
        raise SpectuneError(f"{source} holds no examples{why}; each record needs {task.forms}")
    _tell(records, formats, fields, blank, str(source), say)
    return records


def _tell(
    records: Sequence[Record],
    formats: Counter[str],
    fields: Counter[str],
    blank: Sequence[str],
    source: str,
    say: Callable[[str], None],
) -> None:
    known = {name: count for name, count in formats.items() if name}
    if known and set(known) != {"text"}:
        say(f"{source} was read as " + ", ".join(f"{name} ({count})" for name, count in known.items()))
    if fields:
        say(f"{source} has fields that are not used: {', '.join(sorted(fields))}")
    if blank:
        say(f"{source}: {len(blank)} records have a text without content and were left out, the first in {blank[0]}")


def _shape(values: Record) -> str:
    return " and ".join(key for key in ("messages", "prompt", "completion", "text", "chosen") if key in values)


def _is_blank(values: Record, task: Form) -> bool:
    only = not {"messages", "prompt", "chosen"} & {key for key, value in values.items() if value is not None}
    return only and isinstance(values.get("text"), str) and not values["text"].strip()


def _renamed(record: object, task: Form) -> Any:
    """Return a record with the task's names for the columns that `columns` names."""
    columns = task.config.columns
    if not columns or not isinstance(record, dict):
        return record
    for theirs in columns.values():
        if theirs not in record:
            raise SpectuneError(f"columns: the data has no {theirs!r}{nearest(theirs, record)}")
    others = {k: v for k, v in record.items() if k not in columns and k not in columns.values()}
    return {**others, **{ours: record[theirs] for ours, theirs in columns.items()}}


def form(record: Record) -> str | None:
    """Return which of the forms of `Sft` a record has, by the key that tells: messages, completion, text, or None.

    A table has every column in every row, so that a key without a value is none.
    """
    there = {key for key, value in record.items() if value is not None}
    if "messages" in there:
        return "messages"
    return "completion" if {"prompt", "completion"} <= there else "text" if "text" in there else None


def same(record: Record) -> str:
    """Return what two records have alike that teach the same."""
    known = getattr(record, "same", None)
    if known is not None:
        return known
    kept = {key: value for key, value in record.items() if key in _OF_TASKS} or dict(record)
    text = json.dumps(kept, sort_keys=True, default=str)
    found = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    if isinstance(record, Row):
        record.same = found
    return found


def split(
    records: Sequence[Record], share: float, seed: int, by: Callable[[Record], object] | None = None
) -> tuple[list[Record], list[Record]]:
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
        return list(records), []
    wanted = max(1, round(len(records) * share))
    if wanted >= len(records):
        raise SpectuneError(
            f"held_out={share} of {len(records)} examples leaves one side empty; give more data, another share, or 0"
        )
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


def repeated(records: Sequence[Record], seed: int) -> list[Record]:
    """Return records as often as their weights say; what is left of a weight is drawn by the seed."""
    draws, found = random.Random(seed), []
    for record in records:
        weight = getattr(record, "weight", 1.0)
        found += [record] * (int(weight) + (draws.random() < weight % 1))
    return found

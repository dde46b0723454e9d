"""Records: read from files and data sets, in the forms that tasks take, and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from spectune.errors import SpectuneError, nearest
from spectune.reading import RECORDS
from spectune.training.data.files import rows
from spectune.training.data.formats import Converted, convert, unread
from spectune.training.data.rows import OF_TASKS, Record, Row, of

if TYPE_CHECKING:
    from spectune.training.config import Source, TrainConfig


class Kept(Protocol):
    """Where records are put."""

    def __len__(self) -> int: ...
    def append(self, row: Row, /) -> None:
        """Add a record."""
        ...


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
    into: Kept | None = None,
    weight: float = 1.0,
) -> list[Record]:
    """Read the records of a file, of several, or of a split of a data set, in the form that a task takes.

    Args:
        source: a file (JSON, JSONL, CSV, TSV, Parquet, packed or not), a pattern, or a data set's folder or id; or a
            list of these and of objects with path, weight, config and split.
        task: which says what each record must look like.
        config_name: of the data set, where it has several configurations.
        split_name: of the data set; train if not given.
        say: told what a user should know of the way the data was read.
        into: where to put the records, instead of returning them.
        weight: how often each record is taken.

    Raises:
        SpectuneError: what cannot be read, or a record of another form, with its place.
    """
    records: list[Record] = []
    kept: Kept = records if into is None else into
    before = len(kept)
    if isinstance(source, (list, tuple)):
        for part in source:
            given = part if isinstance(part, str) else part.path
            own = (config_name, split_name) if isinstance(part, str) else (part.config, part.split)
            already = len(kept)
            read(given, task, *own, say, kept, 1.0 if isinstance(part, str) else part.weight)
            say(f"{given}: {len(kept) - already} records")
        return records
    reading = _Reading(task)
    for number, (values, where) in enumerate(rows(str(source), config_name, split_name, say)):
        if number >= RECORDS:
            raise SpectuneError(f"{where}: at most {RECORDS:,} records are read: give a part of them")
        row = reading.record(values, where)
        if row is not None:
            row.weight = weight
            kept.append(row)
    if len(kept) == before:
        blank = reading.blank
        why = f", for {blank.first} and all others have a text without content" if blank.count else ""
        raise SpectuneError(f"{source} holds no examples{why}; each record needs {task.forms}")
    reading.tell(str(source), say)
    return records


class _Places:
    """How many records are of a kind, and where the first is."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, where: str) -> None:
        self.count, self.first = self.count + 1, self.first or where


class _Reading:
    """Makes records of rows as they stand in a source, and keeps what a user should know of them.

    Args:
        task: which says what each record must look like.
    """

    def __init__(self, task: Form) -> None:
        self._form, self._task = task, task.config.task
        self.formats, self.fields = Counter[str](), Counter[str]()
        self.blank, self.empty, self.alike = _Places(), _Places(), _Places()

    def record(self, values: object, where: str) -> Row | None:
        """Return the record of a row; None where it is left out.

        Raises:
            SpectuneError: it has another form, or a field that would change what is learned.
        """
        if not isinstance(values, dict):
            raise SpectuneError(f"{where}: not a JSON object with {self._form.forms}")
        with of(values, where):
            values = _renamed(values, self._form)
            converted = convert(values, self._task)
        judged = self._task == "sft" and converted.format.startswith("unpaired")
        if judged and not converted.values.pop("label"):
            self.formats["left out, for their label is false"] += 1
            return None
        if _is_blank(converted.values, self._form):
            self.blank.add(where)
            return None
        problem = self._form.problem(converted.values)
        if problem is not None:
            raise SpectuneError(f"{where}: {problem}")
        self.formats[converted.format] += 1
        self._look_at_fields(values, converted, where)
        return Row(converted.values, where, converted.plain)

    def _look_at_fields(self, values: Record, converted: Converted, where: str) -> None:
        """Take note of fields that nothing reads; those that would change what is learned are refused."""
        if self._task == "reinforce":  # whose rewards may read any field
            return
        if self._task == "classify":
            self.fields.update(values.keys() - OF_TASKS - {""})
            return
        others, meant = unread(converted, values, _learned_from(converted.values, self._task))
        if meant:
            name = min(meant)
            place = "chat_template_kwargs" if name == "enable_thinking" else "messages"
            raise SpectuneError(
                f"{where}: has {name!r}, which would change what is learned, and nothing reads it beside "
                f"{_shape(converted.values)}: take it out, or put it into {place}"
            )
        self.fields.update(others)
        if _is_empty(converted.values.get("completion")) or _says_nothing(converted.values.get("messages")):
            self.empty.add(where)
        if self._task == "dpo" and converted.values["chosen"] == converted.values["rejected"]:
            self.alike.add(where)

    def tell(self, source: str, say: Callable[[str], None]) -> None:
        """Say how a source was read, and what of it was not."""
        known = {name: count for name, count in self.formats.items() if name}
        if known and set(known) != {"text"}:
            say(f"{source} was read as " + ", ".join(f"{name} ({count})" for name, count in known.items()))
        if self.fields:
            say(f"{source} has fields that are not used: {', '.join(sorted(self.fields))}")
        blank, empty, alike = self.blank, self.empty, self.alike
        if blank.count:
            say(
                f"{source}: {blank.count} records have a text without content and were left out, the first in "
                f"{blank.first}"
            )
        if empty.count:
            say(
                f"{source}: {empty.count} records have an empty answer, of which a stop is learned, the first in "
                f"{empty.first}"
            )
        if alike.count:
            say(
                f"{source}: {alike.count} records have one answer as 'chosen' and as 'rejected', of which nothing is "
                f"learned, the first in {alike.first}"
            )


def _learned_from(values: Record, task: str) -> tuple[str, ...]:
    """Return the fields that a task learns from, of a record that may have those of others too."""
    if task == "dpo":
        return ("prompt", "chosen", "rejected")
    return {"messages": ("messages",), "text": ("text",)}.get(form(values) or "", ("prompt", "completion"))


def _shape(values: Record) -> str:
    return " and ".join(key for key in ("messages", "prompt", "completion", "text", "chosen") if key in values)


def _is_blank(values: Record, task: Form) -> bool:
    if values.get("messages") == [] or _no_row(values):
        return True
    only = not {"messages", "prompt", "chosen"} & {key for key, value in values.items() if value is not None}
    return only and isinstance(values.get("text"), str) and not values["text"].strip()


def _no_row(values: Record) -> bool:
    """Whether a row of a table has no field at all, as spreadsheets end in them."""
    return bool(values) and all(value in (None, "") for value in values.values())


def _is_empty(completion: object) -> bool:
    return completion == [] or (isinstance(completion, str) and not completion.strip())


def _says_nothing(messages: object) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant" and last.get("content") == "" and len(last) == 2


def _renamed(record: Record, task: Form) -> Record:
    """Return a record with the task's names for the columns that `columns` names."""
    columns = task.config.columns
    if not columns:
        return record
    wanted = {name for theirs in columns.values() for name in ([theirs] if isinstance(theirs, str) else theirs)}
    for theirs in sorted(wanted):
        if theirs not in record:
            there = ", ".join(map(repr, record)) or "nothing"
            raise SpectuneError(f"columns: the data has no {theirs!r}{nearest(theirs, record) or f', but {there:.80}'}")
    others = {k: v for k, v in record.items() if k not in columns and k not in wanted}
    found = {ours: record[theirs] for ours, theirs in columns.items() if isinstance(theirs, str)}
    for ours, names in columns.items():
        if isinstance(names, list):
            if ours != "label":
                raise SpectuneError(f"columns: {ours} is one column, and {len(names)} are given; label may be several")
            found[ours] = [name for name in names if _is_yes(name, record[name])]
    return {**others, **found}


def _is_yes(name: str, value: object) -> bool:
    """Whether a column that says yes or no says yes."""
    said = str(value).strip().lower().removesuffix(".0")
    if said not in ("0", "1", "true", "false", "yes", "no"):
        raise SpectuneError(f"columns: {name!r} is one of several labels, which must be 0 or 1, and is {value!r}")
    return said in ("1", "true", "yes")


def form(record: Record) -> str | None:
    """Return which of the forms of `Sft` a record has, by the key that tells: messages, completion, text, or None.

    A table has every column in every row, so that a key without a value is none.
    """
    there = {key for key, value in record.items() if value is not None}
    if "messages" in there:
        return "messages"
    return "completion" if {"prompt", "completion"} <= there else "text" if "text" in there else None

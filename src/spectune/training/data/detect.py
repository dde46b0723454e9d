"""What data is for: the task, and which of its columns the task takes, from the first rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from spectune.errors import SpectuneError
from spectune.training.data.common import says_yes
from spectune.training.data.files import rows
from spectune.training.data.formats import Converted, convert
from spectune.training.data.records import form
from spectune.training.data.rows import of

_LOOKED_AT = 2000
_LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "tag", "rating", "stars")
_LABELS += ("is_spam", "spam", "polarity", "emotion", "language", "coarse_label", "y", "score")
_TEXTS = ("text", "sentence", "review", "comment", "content", "body", "message", "tweet", "document", "question")
_TEXTS += ("utterance", "query", "title", "description")
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"))
_PAIRS += (("question", "sentence"), ("sentence_a", "sentence_b"), ("query", "passage"))
_ASKED = ("prompt", "question", "instruction", "input", "query", "user", "source", "q", "request", "problem")
_OF_FORMATS = {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "context"}
_OF_FORMATS |= {"instruction", "input", "output", "question", "answer", "response", "system", "history", "tools"}
_INDEX = ("", "__index_level_0__", "Unnamed: 0")  # the numbers of rows, as pandas writes them
_KINDS = 150  # labels at most


class Found(NamedTuple):
    """What data is for.

    Args:
        task: sft, classify, dpo or kto.
        columns: the task's names for those of the data, where they differ.
        reason: for both.
    """

    task: str
    columns: dict[str, str | list[str]]
    reason: str


def detect(source: str, *, generates: bool, config: str | None = None, split: str | None = None) -> Found:
    """Return what data is for.

    Args:
        source: a file, a pattern, or a data set's folder or id.
        generates: whether the model does, so that it can learn answers; others learn labels.
        config: of a data set.
        split: of a data set.

    Raises:
        SpectuneError: nothing that a task could learn is there.
    """
    placed: list[Any] = [*islice(rows(source, config, split, lambda note: None), _LOOKED_AT)]
    if not placed:
        raise SpectuneError(f"{source} holds no records")
    for row, where in placed:
        if not isinstance(row, Mapping):
            raise SpectuneError(
                f'{where}: a record is an object with names for its values, as {{"prompt": ..., "completion": ...}}, '
                f"and not {row!r:.40}"
            )
    theirs = _in_other_case(placed[0][0])
    ours = {name: key for key, name in theirs.items()}
    found = _of(source, [(_renamed(row, ours), where) for row, where in placed], generates)
    columns = {key: theirs.get(name, name) if isinstance(name, str) else name for key, name in found.columns.items()}
    if theirs and not columns and found.task != "classify":
        read = convert(_renamed(placed[0][0], ours), found.task).read
        columns = {key: theirs[key] for key in read if key in theirs}
    return found._replace(columns=columns)


def _in_other_case(row: Mapping[str, object]) -> dict[str, str]:
    """Return names of formats for those of a record that differ from them in case or spaces, as headings do."""
    spelled = {name.strip().casefold(): name for name in row}
    return {key: name for key, name in spelled.items() if key in _OF_FORMATS and key not in row}


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in row.items()}


def _of(source: str, placed: Sequence[tuple[Mapping[str, Any], str]], generates: bool) -> Found:
    read = [row for row, _ in placed]
    names = [name for name in read[0] if name not in _INDEX and any(row.get(name) not in (None, "") for row in read)]
    there = set(names)
    if {"chosen", "rejected"} <= there and generates:
        return Found("dpo", {}, "'chosen' and 'rejected' are there")
    if {"prompt", "completion", "label"} <= there and generates and _judged(read):
        return Found("kto", {}, "'label' says of each 'completion' whether it is good")
    answers = _answers(placed)
    label = _label(read, names)
    if not generates or (label is not None and not answers):
        found = _labelled(read, names, label)
        if found is not None:
            return found
        if not generates:
            raise SpectuneError(
                f"{source} {_not_labelled(read, names, label)}, and this model learns labels: name the columns, "
                "columns='{text: ..., label: ...}', or take a model that generates text"
            )
    if answers or "text" in there:
        return Found("sft", {}, f"{answers or 'text'} to learn from")
    return _asked(source, read, names)


def _answers(placed: Sequence[tuple[Mapping[str, object], str]]) -> str | None:
    """Return the format of records with answers, where all of them have one."""
    converted: list[Converted] = []
    for row, where in placed[:200]:
        with of(row, where):
            converted.append(convert(row, "sft"))
    kinds = {each.format for each in converted if form(each.values) in ("messages", "completion")}
    known = all(form(each.values) in ("messages", "completion") for each in converted)
    return (max(kinds, key=len) or "prompt and completion") if known and kinds else None


def _not_labelled(read: Sequence[Mapping[str, object]], names: Sequence[str], label: str | None) -> str:
    """Return why records have no labels that could be learned, in words."""
    if label is not None:
        return f"has labels in {label!r}, and no text beside them ({', '.join(names)})"
    named = next((name for name in names if name.lower() in _LABELS), None)
    if named is None:
        return f"has no column that looks like a label ({', '.join(names)})"
    values = _values(read, named)
    kinds = sorted({type(value).__name__ for value in values})
    count = len({str(value) for value in values})
    if count == 1:
        return f"has one label only in {named!r}, {values[0]!r:.40}, so that there is nothing to tell apart"
    if len(kinds) > 1:
        return f"has labels of several kinds in {named!r} ({', '.join(kinds)})"
    return f"has {count} different values in {named!r} in {len(values)} records, such as {values[0]!r:.40}: no labels"


def _judged(read: Sequence[Mapping[str, object]]) -> bool:
    values = _values(read, "label")
    return all(says_yes(value) is not None for value in values) and len(set(map(says_yes, values))) == 2


def _values(read: Sequence[Mapping[str, object]], name: str) -> list[Any]:
    return [row.get(name) for row in read if row.get(name) not in (None, "")]


def _label(read: Sequence[Mapping[str, object]], names: Sequence[str]) -> str | None:
    """Return the column whose few values come back: the one with a label's name first, then the one with the fewest."""

    def kinds(name: str) -> int | None:
        values = _values(read, name)
        if any(isinstance(value, (list, dict)) or len(str(value)) > 60 for value in values):
            return None
        if any(isinstance(value, float) and not value.is_integer() for value in values):
            return None
        count = len({str(value) for value in values})
        comes_back = count < len(values) and name.lower() not in _TEXTS
        if not comes_back and name.lower() not in _LABELS:
            return None
        return count if 2 <= count <= min(_KINDS, max(2, len(values) // 2)) else None

    able = {name: count for name in names if (count := kinds(name)) is not None}
    named = [name for name in names if name.lower() in _LABELS and (name in able or _other_kind(_values(read, name)))]
    return min(named or able, key=lambda name: _LABELS.index(name.lower()) if named else able[name], default=None)


def _other_kind(values: Sequence[object]) -> str | None:
    """Return what labels are that are neither names nor whole numbers: lists of names, or numbers; None otherwise."""
    if values and all(isinstance(value, list) and all(isinstance(n, (str, int)) for n in value) for value in values):
        return "lists of labels"
    if values and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return "numbers" if any(isinstance(value, float) and not value.is_integer() for value in values) else None
    return None


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(each, Mapping) for each in value))


def _length(read: Sequence[Mapping[str, object]], name: str) -> float:
    values = _values(read, name)
    if not values or not all(isinstance(value, str) for value in values):
        return 0.0
    return sum(map(len, values)) / len(values)


def _labelled(read: Sequence[Mapping[str, object]], names: Sequence[str], label: str | None) -> Found | None:
    others = [name for name in names if name != label and _length(read, name) > 0]
    if label is None or not others:
        return None
    pair = next((pair for pair in _PAIRS if set(pair) <= set(others)), None)
    first = pair[0] if pair else next((name for name in _TEXTS if name in others), None)
    first = first or max(others, key=lambda name: _length(read, name))
    columns = {"text": first, "label": label} | ({"text_pair": pair[1]} if pair else {})
    kinds = len({str(value) for value in _values(read, label)})
    other = _other_kind(_values(read, label))
    reason = f"{label!r} holds {other}" if other else f"{label!r} has {kinds} values that come back: texts with labels"
    return Found("classify", {ours: theirs for ours, theirs in columns.items() if ours != theirs}, reason)


def _asked(source: str, read: Sequence[Mapping[str, object]], names: Sequence[str]) -> Found:
    """Return a prompt and what follows it by their names, or by the order of the two longest columns of text."""
    inside = next((name for name in names if any(map(_is_nested, _values(read, name)))), None)
    if inside is not None:
        raise SpectuneError(
            f"{source} has {inside!r}, which holds objects and is of no known format: write out what is in it, as "
            "messages or prompt and completion, or name two columns of text, columns='{prompt: ..., completion: ...}'"
        )
    texts = sorted((name for name in names if _length(read, name) > 0), key=lambda name: -_length(read, name))
    if not texts:
        raise SpectuneError(f"{source} has no text to learn from ({', '.join(names)})")
    if len(texts) == 1:
        return Found("sft", {"text": texts[0]}, f"{texts[0]!r} is the only text")
    two = sorted(texts[:2], key=names.index)
    named = next((name for name in _ASKED for own in texts if own.lower() == name), None)
    if named is not None:
        asked = next(own for own in texts if own.lower() == named)
        two = [asked, next(own for own in texts if own != asked)]
    columns: dict[str, str | list[str]] = {"prompt": two[0], "completion": two[1]}
    return Found("sft", columns, f"{two[1]!r} is taken as the answer to {two[0]!r}")

"""What texts are labelled with: one of some names, any number of them, or a number."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import cast

from spectune.adapters.labels import NUMBER, ONE, SEVERAL
from spectune.errors import SpectuneError
from spectune.reading import parse_json
from spectune.training.data.records import Record, of

_AS_PYTHON = re.compile(r"\s*\[\s*'.*'\s*\]\s*$")  # a list of names
_MISSING = ("nan", "none", "null", "na", "n/a", "<na>")  # as tables write what is not there
_FEW = 50  # numbers as labels, which may be classes; more are told of


def label_problem(label: object, problem: str | None) -> str | None:
    """Return what is wrong with one label, or None.

    Args:
        label: as it was read.
        problem: what labels are, None where they say so themselves.
    """
    if isinstance(label, list):
        wrong = [each for each in label if not isinstance(each, (str, int)) or each == ""]
        if wrong:
            remedy = "; write the names of those that are 1" if _is_vector(label) else ""
            return f"label must be a list of names, and has {wrong[0]!r}{remedy}"
        return None if problem in (None, SEVERAL) else f"label is a list, and problem_type is {problem}"
    if problem != ONE and isinstance(label, str) and _AS_PYTHON.match(label):
        return f"label is {label!r:.40}, a list as Python shows it: write JSON, with double quotes around the names"
    if isinstance(label, float) and not math.isfinite(label):
        return f"label must be a finite number, not {label!r}"
    if problem == NUMBER:
        return None if _number(label) is not None else f"label must be a number, not {label!r}"
    if problem == SEVERAL:
        return None if _listed(label) is not None else f"label must be a list of names, not {label!r}"
    whole = isinstance(label, (str, int)) or (isinstance(label, float) and (problem is None or label.is_integer()))
    if whole and label != "":
        return None
    missing = ": name it, or take the record out" if label in (None, "") else ""
    return f"label must be a name, a number or a list of names, not {label!r}{missing}"


def _number(label: object) -> float | None:
    if isinstance(label, bool) or not isinstance(label, (str, int, float)):
        return None
    try:
        found = float(label)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _listed(label: object) -> list[str] | None:
    """Return a list of names, which may be JSON text, as tables hold it."""
    if isinstance(label, str) and label.lstrip().startswith("["):
        try:
            label = parse_json(label, "the label")
        except SpectuneError:
            return None
    return [name_of(each) for each in label] if isinstance(label, list) else None


def _is_vector(label: Sequence[object]) -> bool:
    """Whether a list may be a zero or one for each of several labels, and not their names."""
    return len(label) > 1 and all(str(each).removesuffix(".0") in ("0", "1", "True", "False") for each in label)


def name_of(label: object) -> str:
    """Return the name of one label: a number of a table is the same as its text."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def problem_type(records: Sequence[Record]) -> str:
    """Return what labels are: lists are several names, numbers with a fraction numbers, and the rest one name each."""
    labels = [record["label"] for record in records]
    if any(isinstance(label, list) for label in labels) or all(_listed(label) is not None for label in labels):
        return SEVERAL
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        return NUMBER
    if all(isinstance(label, str) for label in labels):
        numbers = [_number(label) for label in labels]
        if None not in numbers and any(number is not None and not number.is_integer() for number in numbers):
            return NUMBER
    return ONE


def settle(records: Sequence[Record], problem: str) -> None:
    """Write every label as what it is: a name, a list of names, or a number.

    Raises:
        SpectuneError: a label that is of another kind than the others, with its place.
    """
    if problem == ONE:
        return
    lists = [_listed(record["label"]) for record in records] if problem == SEVERAL else []
    if lists and all(each and _is_vector(each) and len(each) == len(lists[0] or ()) for each in lists):
        with of(records[0]):
            raise SpectuneError(
                f"label is {records[0]['label']!r:.40}, a zero or one for each label, as all others are: write the "
                "names of those that are 1, or a column for each label, columns='{label: [toxic, insult]}'"
            )
    for record in records:
        label = record["label"]
        found = _number(label) if problem == NUMBER else _listed(label)
        if found is None:
            kind = "numbers" if problem == NUMBER else "lists of names"
            with of(record):
                raise SpectuneError(f"label is {label!r}, and others are {kind}: give one kind, or problem_type={ONE}")
        if isinstance(found, list):
            found = sorted(dict.fromkeys(found))
        cast("dict[str, object]", record)["label"] = found


def kinds(records: Sequence[Record], problem: str) -> dict[int, object]:
    """Return for each record, by its identity, what a part of the data should have as much of as the whole.

    One label is its own kind; several are the rarest of them; numbers lie in fifths of their order.
    """
    if problem == NUMBER:
        order = sorted(range(len(records)), key=lambda i: records[i]["label"])
        return {id(records[i]): 5 * place // len(records) for place, i in enumerate(order)}
    if problem == SEVERAL:
        count = Counter(name for record in records for name in record["label"])
        return {id(r): min(r["label"], key=lambda name: (count[name], name), default=None) for r in records}
    return {id(record): name_of(record["label"]) for record in records}


def names(records: Sequence[Record], problem: str) -> list[str]:
    """Return the label names, numbers by size and others by the alphabet; of numbers the one name "label"."""
    if problem == NUMBER:
        return ["label"]
    found = {name for record in records for name in _names(record["label"])}
    numbers = all(name.removeprefix("-").isdecimal() and name.isascii() for name in found)
    return sorted(found, key=int if numbers else None)


def _names(label: object) -> list[str]:
    return label if isinstance(label, list) else [name_of(label)]


def check_known(records: Sequence[Record], known: Sequence[str]) -> None:
    """Raise for labels that are not among those known.

    Raises:
        SpectuneError: they are named.
    """
    strange = sorted({name for record in records for name in _names(record["label"])} - set(known))
    if strange:
        raise SpectuneError(
            f"the evaluation data has labels that the training data has not: {', '.join(strange)} (training: "
            f"{', '.join(known)}); name them alike, or give more data"
        )


def notes(records: Sequence[Record], problem: str, given: bool) -> list[str]:
    """Return what a user should know of labels.

    Args:
        records: all of them.
        problem: what their labels are.
        given: whether that was said, or follows from the labels.
    """
    if problem == NUMBER:
        return _of_numbers([record["label"] for record in records], given)
    found: list[str] = []
    there = {name for record in records for name in _names(record["label"])}
    if problem == SEVERAL:
        none = sum(not record["label"] for record in records)
        found += ["labels are lists: any number of them may be right (problem_type: multi_label_classification)"]
        found += [f"{none} of {len(records)} records have none of the labels"] if none else []
    elif not given and len(there) > _FEW and all(_number(name) is not None for name in there):
        found.append(f"labels are {len(there)} numbers, each a class of its own; problem_type=regression predicts them")
    written: dict[str, set[str]] = {}
    for name in there:
        written.setdefault(" ".join(name.split()).casefold(), set()).add(name)
    missing = sorted(name for name in there if name.strip().casefold() in _MISSING)
    if missing:
        found.append(
            f"{', '.join(map(repr, missing))} is a label like others: take these records out, if it stands for none"
        )
    if problem == ONE:
        found += _of_lists(there)
    for spellings in written.values():
        if len(spellings) > 1:
            listed = ", ".join(map(repr, sorted(spellings)))
            found.append(f"{listed} are {len(spellings)} labels that differ in case or spaces")
    return found


def _of_lists(there: set[str]) -> list[str]:
    """Return what a user should know of names that look like numbers or lists and are taken as they stand."""
    comma = next((name for name in sorted(there) if re.fullmatch(r"-?\d+,\d+", name.strip())), None)
    if comma is not None and all(re.fullmatch(r"-?\d+(,\d+)?", name.strip()) for name in there):
        return [f"{comma!r} is taken as a name: numbers to predict have a point, and not a comma"]
    parts = {part.strip() for name in there for part in re.split(r"[,;|]", name)}
    several = next((name for name in sorted(there) if re.search(r"[,;|]", name)), None)
    if several is not None and len(parts) < len({name.strip() for name in there}):
        return [f'{several!r} is taken as one name: of several labels write a list, ["...", "..."]']
    return []


def _of_numbers(values: Sequence[float], given: bool) -> list[str]:
    mean, spread = fmean(values), pstdev(values)
    why = "" if given else "; problem_type=single_label_classification takes each as a class"
    found = [f"labels are numbers, {min(values):g} to {max(values):g}, to predict (problem_type: regression){why}"]
    if abs(mean) > 20 or spread > 20 or 0 < spread < 0.02:
        found.append(
            f"their mean is {mean:.3g} and their standard deviation {spread:.3g}: numbers of about one are learned in "
            "far fewer steps, so scale them"
        )
    return found


def summary(records: Sequence[Record]) -> Mapping[str, float]:
    """Return how often each label is there, the most frequent first; of numbers their range and mean."""
    labels = [record["label"] for record in records]
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        return {"least": min(labels), "mean": fmean(labels), "most": max(labels)}
    return dict(Counter(name for label in labels for name in _names(label)).most_common())


def told(label: object) -> str:
    """Return one record's label in words."""
    return f"{label:g}" if isinstance(label, float) else ", ".join(_names(label)) or "none"

"""Rows of JSON: a record a line, a list of records, or an object around one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path

from spectune.errors import SpectuneError
from spectune.reading import DOCUMENT_BYTES, RECORD_BYTES, parse_json

Rows = Iterator[tuple[object, str]]  # each with where it is, for messages
_AROUND = ("data", "train", "rows", "examples", "records", "instances")  # the key of a list of records
_EMPTY_LINES, _EMPTY_TEXT = 100_000, 1 << 20  # in a row: a small packed file may hold billions of them
_CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\n\r]*")
_JQ = ", as `jq -c . FILE` does"
_DECODER = json.JSONDecoder()


def lines_of(path: Path, lines: Iterable[str]) -> Rows:
    """Yield the records of lines, an object each; empty lines are none.

    Raises:
        SpectuneError: a line is no JSON, has a key twice, or is too deep.
    """
    empty = 0
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if line.isspace() or not line:
            empty += 1
            if empty > _EMPTY_LINES:
                raise SpectuneError(f"{where}: it and {_EMPTY_LINES:,} lines before it are empty")
            continue
        empty = 0
        line = line.removesuffix("\n").removeprefix("\ufeff")  # which files that were put together have inside
        try:
            found = parse_json(line, where)
        except SpectuneError as error:
            raise SpectuneError(_told(line, where) or str(error)) from None
        yield found, where


def object_of(path: Path, lines: Iterator[str], say: Callable[[str], None]) -> Rows:
    """Yield the records of a file that begins with an object: one a line, one alone, or those of a list in it.

    Args:
        path: of the file, for messages.
        lines: of it.
        say: told of lists that are not read.

    Raises:
        SpectuneError: as `lines_of`; or the object is too large.
    """
    begin: list[str] = []  # with its empty lines, which are counted where a line is named
    filled: list[str] = []
    for line in islice(lines, _EMPTY_LINES):
        begin.append(line if line.strip() else "\n")
        filled += [line] if line.strip() else []
        if len(filled) == 2:
            break
    if len(filled) == 2 and _is_object(filled[0]):
        yield from lines_of(path, chain(begin, lines))
        return
    pieces, size = [], 0
    for line in chain(begin, lines):
        size += len(line)
        if size > DOCUMENT_BYTES:
            raise SpectuneError(
                f"{path} is one document of more than {DOCUMENT_BYTES:,} bytes: write each record as a line of JSON"
            )
        pieces.append(line)
    text = "".join(pieces)
    try:
        found = parse_json(text, str(path), DOCUMENT_BYTES)
    except SpectuneError as error:
        problem = str(error)
        raise SpectuneError(
            f"{problem}; write one record a line{_JQ}" if "Extra data" in problem else problem
        ) from None
    around = _columns(found)
    if around is not None:
        raise SpectuneError(
            f"{path} holds {around} and not records: write a list of records, or one a line, as pandas' "
            "to_json(path, orient='records', lines=True) does"
        )
    lists = [key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    key = next((key for key in _AROUND if key in lists), None)
    if key is not None and len(lists) > 1:
        others = ", ".join(map(repr, (name for name in lists if name != key)))
        say(f"{path} was read from {key!r} alone; it has {others} too")
    yield from numbered([found] if key is None else found[key], str(path))


def numbered(found: Iterable[object], name: str) -> Rows:
    """Yield records with their numbers in what is called so."""
    for number, row in enumerate(found, start=1):
        yield row, f"{name}, row {number}"


def _told(text: str, where: str) -> str | None:
    """Return what is wrong with the JSON of a line, and what to do; None where it is JSON."""
    begin = _skipped(text, 0)
    try:
        _, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", begin)
        said = getattr(error, "msg", "too deep").removesuffix(" starting at")
        problem = f"{said} at character {at + 1}"
        return f"{where} is not valid JSON: {problem}{_remedy(text[begin:], at - begin)}"
    end = _skipped(text, end)
    if end == len(text):
        return None
    if text[end] == ",":
        return f"{where} is not valid JSON: a comma follows the record; take the commas at the ends of lines out"
    more = f"more follows the record at character {end + 1}"
    return f"{where} is not valid JSON: {more}; write one record a line{_JQ if text[end] in '{[' else ''}"


def _remedy(text: str, at: int) -> str:
    """Return what to do about JSON that is broken at a character, as far as it shows."""
    if text[:1] == "{" and text[at : at + 1] == "'":
        return "; names and texts stand in double quotes: write records by json.dumps, and not as Python shows them"
    if text.rstrip() in ("{", "["):
        return f"; write each record on one line{_JQ}"
    if not text[at:].strip() or (text[at] == '"' and not text.rstrip().endswith(("}", "]"))):
        return "; it was not written to its end, or goes on behind the line"
    return "; JSON has no comments, and no comma before a bracket" if text[at] in "#/]}" else ""


def _columns(found: dict[str, object]) -> str | None:
    """Return what one object holds that is no record, but values by column or records by name; None otherwise."""
    values = [*found.values()]
    if len(values) > 1 and all(isinstance(value, list) for value in values):
        lists = [value for value in values if isinstance(value, list)]
        plain = all(isinstance(each, (str, int, float, type(None))) for value in lists for each in value)
        return "a list for each column" if plain and len(set(map(len, lists))) == 1 and len(lists[0]) > 1 else None
    if not values or not all(isinstance(value, dict) and value for value in values):
        return None
    inner = [tuple(value) for value in values if isinstance(value, dict)]
    if inner[0][0].isdecimal() or (len(inner) > 1 and len(set(inner)) == 1):
        return "objects inside one object"
    return None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def list_of(path: Path, read: Callable[[int], str]) -> Rows:
    """Yield the items of a list, of which no more is in memory than one and what was read with it.

    Args:
        path: of the file, for messages.
        read: returns the next so many characters of it, fewer at its end.

    Raises:
        SpectuneError: it is no JSON, or an item is too large, too deep, or has a key twice.
    """
    text, at, lines = read(_CHUNK), 0, 1
    at = text.index("[") + 1
    for number in count(1):
        where, chunk = f"{path}, row {number}", _CHUNK
        while True:
            begin = _skipped(text, at)
            if number == 1 and text[begin : begin + 1] == "]":
                end, last = begin, True
                break
            try:
                _, end = _DECODER.raw_decode(text, begin)
                broken = end = _skipped(text, end)
                problem = "Expecting ',' delimiter"
            except (ValueError, RecursionError) as error:
                end, problem = len(text), getattr(error, "msg", "too deep")
                broken = getattr(error, "pos", begin)
            if end < len(text):  # else the item may go on
                last = text[end] == "]"
                if last or text[end] == ",":
                    break
            more = read(chunk) if end - begin <= RECORD_BYTES else ""
            if not more:
                if end - begin > RECORD_BYTES:
                    problem = f"it has more than {RECORD_BYTES:,} bytes: {problem}"
                line = lines + text.count("\n", 0, begin)
                remedy = _remedy(text[begin:], broken - begin)
                raise SpectuneError(f"{where}, which begins in line {line}, is not valid JSON: {problem}{remedy}")
            lines += text.count("\n", 0, at)
            text, at, chunk = text[at:] + more, 0, 2 * chunk
        if end > begin or not last:
            yield parse_json(text[begin:end], where), where
        at = end + 1
        if last:
            break
    while rest := text[at:] or read(_CHUNK):
        if rest.strip():
            raise SpectuneError(f"{path} is not valid JSON: there is more behind the list")
        text, at = "", 0


def _skipped(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()

"""Reading what others wrote: bounds on size, depth and number in one place, and one sentence for whatever is beyond.

A file is a regular one (no pipe, no device) of a bounded size; a document a tree of bounded depth, with each key once
and text that UTF-8 can hold; a name inside a folder leads nowhere else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import psutil
import yaml
from safetensors import safe_open

from spectune.errors import SpectuneError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")
JSON_BYTES = 32 << 20  # of a config or an index
YAML_BYTES = 512 << 10
DEPTH = 64  # of lists and objects inside each other
ITEMS = 1_000_000  # of a document of JSON
YAML_ITEMS = 100_000  # of a document of YAML, those that it repeats by name counted each time
MOST_TENSORS = 50_000  # of an adapter
HEADER_BYTES = 32 << 20  # of a safetensors file
DIMENSIONS = 64  # of a tensor that PyTorch computes with
SIDE = 1 << 24  # of a matrix that an adapter changes
BASE_JSON_BYTES = 256 << 20  # of a config or a tokenizer of a base, which transformers reads
DOCUMENT_BYTES = 1 << 30  # of records that are one document of JSON, unpacked
RECORD_BYTES = 32 << 20  # of a line of JSON, or a field of a table
RECORDS = 20_000_000  # of data
TEXT_BYTES = 64 << 20  # of what is typed or piped in


def path_of(name: str | os.PathLike[str]) -> Path:
    """Return the path of a name that a file or a folder can have.

    Raises:
        SpectuneError: none can, by its length or by characters that no name has.
    """
    try:
        os.lstat(name)
    except ValueError as error:
        raise SpectuneError(f"{os.fspath(name)!r:.80} is no name of a file or folder: {reason(error)}") from None
    except OSError as error:  # most of which are told where the file is needed
        if error.errno == errno.ENAMETOOLONG:
            raise SpectuneError(f"{os.fspath(name)!r:.80} is no name of a file or folder: {reason(error)}") from None
    return Path(name)


def check_file(path: Path, most: int | None = None) -> None:
    """Raise unless a path is a regular file, of at most so many bytes; what is not there is a FileNotFoundError.

    Raises:
        SpectuneError: it is a folder, a pipe or a device, too large, or cannot be looked at.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SpectuneError(f"{path} cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SpectuneError(f"{path} is no file but a folder, a pipe or a device; give the file itself")
    if most is not None and status.st_size > most:
        raise SpectuneError(f"{path} has {status.st_size:,} bytes, and at most {most:,} are read of such a file")


def check_memory(path: Path, what: str) -> None:
    """Raise unless what a file holds, all of which is to be held, fits into the memory that is free.

    A file of holes takes no room on a disk, whatever its length.

    Raises:
        SpectuneError: it does not.
    """
    size, free = path.stat().st_size, psutil.virtual_memory().available
    if size > free:
        raise SpectuneError(f"{path} has {size:,} bytes, and {free:,} of memory are free: {what}")


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """Return a file's text.

    Raises:
        FileNotFoundError: it is not there.
        SpectuneError: it cannot be read, is too large or no UTF-8.
    """
    check_file(path, most)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise SpectuneError(f"{path} is not text in UTF-8 (byte {error.start}); convert it") from None
    except OSError as error:
        raise SpectuneError(f"{path} cannot be read: {reason(error)}") from None


def lines_of(text: str) -> list[str]:
    """Return the lines of a text: line ends alone end them, and not what else `str.splitlines` takes for one."""
    return re.split(r"\r\n?|\n", text)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        SpectuneError: it is not there or cannot be read, is no JSON, too large or too deep, or has a key twice.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise SpectuneError(f"{path} is not there") from None
    return parse_json(text, str(path))


def parse_json(text: str, where: str, items: int = ITEMS) -> Any:
    """Return what JSON holds, as `read_json`; `items` is how many values it may."""
    few = len(text) < items
    if not few and sum(map(text.count, "[{,")) > 4 * items:  # before an object is made of each
        raise SpectuneError(f"{where} has more than {items:,} values")
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
    except SpectuneError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise SpectuneError(f"{where} is not valid JSON: {reason(error)}") from None
    if not few or text.count("[") + text.count("{") > DEPTH or _HALVES.search(text):  # else there is nothing to find
        _check_tree(found, where, items)
    return found


def read_yaml(path: Path) -> object:
    """Return what a YAML file holds: plain values, each key once.

    Raises:
        SpectuneError: it is not there or cannot be read, is no YAML, too large, too deep or repeats itself too often.
    """
    try:
        text = read_text(path, YAML_BYTES)
    except FileNotFoundError:
        beside = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SpectuneError(f"{path} is not there{nearest(path.name, beside)}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> object:
    """Return what YAML holds, as `read_yaml`."""
    try:
        _check_events(text)
        found = yaml.load(text, _Loader)
    except SpectuneError as error:
        raise SpectuneError(f"{where}: {error}") from None
    except Exception as error:  # whatever a tag makes of the constructors
        told = reason(error).replace(' in "<unicode string>",', ", at")
        raise SpectuneError(f"{where} is not valid YAML: {told}") from None
    _check_tree(found, where)
    return found


def _check_events(text: str) -> None:
    """Raise where YAML is too deep, or too large with what it repeats by name, before anything is made of it.

    libyaml's own loader would leave the stack on a depth of 100,000, and merging repeated mappings takes memory that
    grows as a power of their number.
    """
    sizes: dict[str, int] = {}  # of what has a name, when it is repeated
    open_: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, _Safe):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            open_.append((anchor, total))
            total += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, before = open_.pop()
            sizes |= {anchor: total - before} if anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            if anchor in [name for name, _ in open_]:
                raise SpectuneError(f"line {event.start_mark.line + 1} repeats what it is inside of (*{anchor})")
            total += sizes.get(anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            if "\0" in event.value:
                raise SpectuneError(f"line {event.start_mark.line + 1} has a character of zero")
            sizes |= {anchor: 1} if anchor else {}
            total += 1
        if len(open_) > DEPTH or total > YAML_ITEMS:
            raise SpectuneError("it is too deep, or repeats itself too often")


_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where PyYAML has it
_HALVES = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # of characters


class _Loader(_Safe):
    """PyYAML's safe loader, for which a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            seen: set[object] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, (str, int, float, bool, type(None))):
                    raise SpectuneError(f"line {key_node.start_mark.line + 1} has a key that is no text or number")
                if key in seen:
                    raise SpectuneError(f"the key {key!r} is given twice, again in line {key_node.start_mark.line + 1}")
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parsed(kind: type[M], values: object, where: str) -> M:
    """Return a document as the typed values of its schema.

    Args:
        kind: the schema.
        values: plain values, as JSON or YAML has them.
        where: what to call them in messages.

    Raises:
        SpectuneError: they do not fit; the first that does not is named.
    """
    if not isinstance(values, dict):
        raise SpectuneError(f"{where} is {values!r:.60}, not an object")
    from pydantic import ValidationError  # which adapters on a model go without

    try:
        return kind.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    parts: list[str] = []
    inner = values
    for part in first["loc"]:  # which names the alternatives of a union too
        if part in inner if isinstance(inner, dict) else isinstance(part, int) and isinstance(inner, list):
            inner = cast(Any, inner)[part]
        elif first["type"] != "missing":
            continue
        parts.append(f"item {part}" if isinstance(part, int) else repr(part))
    *around, key = parts or ["''"]
    place = f"{' in '.join([*reversed(around), where])}"[:400]
    if first["type"] == "extra_forbidden":
        raise SpectuneError(f"{place} has the unknown key {key:.60}{nearest(str(first['loc'][-1]), _keys(kind))}")
    if first["type"] == "missing":
        raise SpectuneError(f"{place} lacks the key {key:.60}")
    message = first["msg"].replace("Input should be", "should be").replace("Value error, ", "")
    message = message.partition(" or instance of")[0]  # a schema's own name
    raise SpectuneError(f"{key:.60} in {place} is {first['input']!r:.60}: {message[:1].lower()}{message[1:]}")


def _keys(kind: object) -> list[str]:
    """Return the keys of a schema and of those inside it."""
    fields = getattr(kind, "model_fields", {})
    own = [field.alias or name for name, field in fields.items()]
    types = [field.annotation for field in fields.values()] if fields else get_args(kind)
    return own + [key for each in types for key in _keys(each)]


def _is_name(text: str) -> bool:
    try:
        parts = text.encode().split(b"/")
    except UnicodeEncodeError:  # half of a pair, which JSON can spell
        return False
    return bool(text) and "\0" not in text and all(len(part) <= 255 for part in parts)


def inside(folder: Path, name: object, where: str) -> Path:
    """Return the path of a file that a document names, which must lie in a folder.

    Args:
        folder: where.
        name: relative, with "/" between its parts.
        where: what names it.

    Raises:
        SpectuneError: the name is absolute, has "..", or is no text.
    """
    if not isinstance(name, str) or not _is_name(name):
        raise SpectuneError(f"{where} names {name!r:.60}, which is no file")
    parts = PurePosixPath(name).parts
    strange = PureWindowsPath(name)
    if name.startswith("/") or ".." in parts or strange.drive or strange.root or ".." in strange.parts:
        raise SpectuneError(f"{where} names {name!r:.120}, which lies outside its folder; only files inside are read")
    return folder / name


_DEEP = re.compile(rb'"shape"\s*:\s*\[(?:[^],]*,){%d}' % DIMENSIONS)


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of files, one behind the other, of which a mebibyte is held at a time."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def check_tensors_file(path: Path) -> None:
    """Raise unless a path is a regular file with a safetensors header of a bounded size; see `check_file`.

    Raises:
        SpectuneError: it is not.
    """
    _header(path)


def _header(path: Path) -> bytes:
    check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, HEADER_BYTES))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SpectuneError(f"{path} cannot be read: {reason(error)}") from None
    if length > HEADER_BYTES:
        raise SpectuneError(
            f"{path} is damaged or no safetensors file: its header says {length:,} bytes, and at most "
            f"{HEADER_BYTES:,} are read"
        )
    return header


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, which is how all of them are opened.

    A pipe in its place would be waited for for ever, and of two tensors by one name one be taken without a word.

    Raises:
        FileNotFoundError: it is not there.
        SpectuneError: as `check_tensors_file`, or it names a tensor twice, or one is of too many dimensions.
    """
    header = _header(path)
    if _DEEP.search(header):
        raise SpectuneError(f"{path} is damaged: a tensor in it has more than {DIMENSIONS} dimensions")
    opened = safe_open(path, framework="pt")
    if header.count(b'"data_offsets"') != len(opened.keys()):  # or something else has that name
        json.loads(header, object_pairs_hook=lambda pairs: _once(pairs, str(path)))
    return opened


def reason(error: BaseException) -> str:
    """Return what an error of the system says, on one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text[:160]


def _once(pairs: Iterable[tuple[str, object]], where: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise SpectuneError(f"{where} has the key {key!r:.60} twice")
        found[key] = value
    return found


def _check_tree(value: object, where: str, left: int = ITEMS) -> None:
    """Raise where a document is too deep, or has more values than are left, those that it repeats counted each time."""
    stack: list[tuple[object, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        left -= 1
        if depth > DEPTH or left < 0:
            raise SpectuneError(f"{where} is too deep, or repeats itself too often")
        if isinstance(item, dict):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple, set)):
            stack += [(part, depth + 1) for part in item]
        elif isinstance(item, str):
            check_text(item, where)


def check_text(text: str, where: str) -> None:
    """Raise where a text has halves of characters, as bytes have that are not UTF-8.

    Raises:
        SpectuneError: it has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise SpectuneError(
            f"{where} has {half!a}, half a character (of a surrogate pair), which no text can hold: it was cut apart "
            "where a text was shortened"
        ) from None

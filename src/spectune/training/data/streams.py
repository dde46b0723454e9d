"""The bytes and the text of a data file: unpacked as they are read, in the encoding that they are in, line by line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from spectune.errors import SpectuneError, need
from spectune.reading import RECORD_BYTES

# what gives the bytes of a packed file as they are read
PACKED: dict[str, Callable[[BinaryIO, Path], Any]] = {
    ".gz": lambda file, path: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file, path: bz2.BZ2File(file),
    ".xz": lambda file, path: lzma.LZMAFile(file),  # noqa: SIM115 (whoever asks for it closes it)
    ".zst": lambda file, path: _zstd(file, path),
}
UTF8 = "utf-8-sig"
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Within the context, what reading and unpacking a file raise is said in a sentence."""
    try:
        yield
    except OSError as error:
        raise SpectuneError(f"cannot read {path}: {error.strerror or error}") from None
    except SpectuneError:  # of a line, and a ValueError
        raise
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise SpectuneError(f"cannot unpack {path}: {error}") from None


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Give a file's bytes, unpacked as they are read."""
    with path.open("rb") as file:
        begin = file.read(8)
        # by content alone: whoever fetches a file may unpack it, and leave it its name
        packing = next((suffix for magic, suffix in _MAGIC.items() if begin.startswith(magic)), None)
        unpack = None if packing is None else PACKED[packing]
        file.seek(0)
        if unpack is None:
            yield file
            return
        with unpack(file, path) as unpacked:
            yield io.BufferedReader(unpacked)


def pieces_of(path: Path, stream: io.BufferedReader, encoding: str) -> Callable[[int], str]:
    """Return what gives the next so many bytes of a stream as text."""
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 1

    def read(size: int) -> str:
        nonlocal lines
        piece = stream.read(size)
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line = lines + piece[: error.start].count(b"\n")
            raise SpectuneError(f"{path}, line {line}: not valid JSON, for it is not UTF-8 ({error})") from None
        lines += text.count("\n")
        return text

    return read


def text_lines(path: Path, stream: io.BufferedReader, encoding: str, most: int = RECORD_BYTES) -> Iterator[str]:
    """Yield the lines of a file, of which newlines alone are the ends."""
    if encoding != UTF8:
        yield from _decoded(path, stream, encoding, "\n", most)
        return
    for number, line in enumerate(iter(lambda: stream.readline(most + 1), b""), start=1):
        _check_length(path, number, line, most)
        try:
            yield line.decode(encoding if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise SpectuneError(f"{path}, line {number}: not valid JSON, for it is not UTF-8 ({error})") from None


def table_lines(path: Path, stream: io.BufferedReader, encoding: str, say: Callable[[str], None]) -> Iterator[str]:
    """Yield the lines of a table, which is Windows-1252 where it is not UTF-8."""
    for tried in (encoding, "cp1252") if encoding == UTF8 else ():
        decoder = codecs.getincrementaldecoder(tried)()
        try:
            with opened(path) as whole:
                for part in iter(lambda: whole.read(1 << 20), b""):
                    decoder.decode(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            if tried != UTF8:
                raise SpectuneError(f"cannot read {path}: it is neither UTF-8 nor Windows-1252 ({error})") from None
            continue
        encoding = tried
        if tried != UTF8:
            say(f"{path} is not UTF-8, and was read as Windows-1252 (cp1252)")
        break
    yield from _decoded(path, stream, encoding, "", RECORD_BYTES)


def _check_length(path: Path, number: int, line: bytes | str, most: int) -> None:
    if len(line) > most:
        raise SpectuneError(f"{path}, line {number}: has more than {most:,} bytes, and no more are read")


def _decoded(path: Path, stream: io.BufferedReader, encoding: str, newline: str, most: int) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding, newline=newline)
    try:
        for number, line in enumerate(iter(lambda: text.readline(most + 1), ""), start=1):
            _check_length(path, number, line, most)
            yield line
    except UnicodeError as error:  # zeros or a mark said an encoding, and the rest is none of it
        raise SpectuneError(f"cannot read {path} as {encoding}: {error}") from None
    finally:
        with suppress(ValueError):  # whoever opened the file has closed it already
            text.detach()


def encoding_of(content: bytes) -> str:
    """Return the encoding that a mark at the beginning says, or that zeros between the letters do."""
    if content[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    begin = content[:200]
    for encoding, zeros in (("utf-16-le", begin[1::2]), ("utf-16-be", begin[::2])):
        if len(zeros) > 1 and zeros.count(0) > 0.8 * len(zeros):
            return encoding
    return UTF8


def _zstd(file: BinaryIO, path: Path) -> object:
    pyarrow = need("pyarrow", f"reading {str(path)!r}")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")

"""The bytes and the text of data files: packings by content, encodings by marks and zeros, bounds of lines."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from spectune import SpectuneError
from spectune.training.data.streams import encoding_of, opened, pieces_of, table_lines, text_lines, unpacking

TEXT = "eins\nzwölf\n"


def written(folder, content):
    (folder / "a").write_bytes(content)
    return folder / "a"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_a_file_is_unpacked_by_what_it_holds(pack, tmp_path):
    with opened(written(tmp_path, pack(TEXT.encode()))) as stream:
        assert stream.read() == TEXT.encode()


def test_zstd_is_unpacked(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    packed = pyarrow.compress(TEXT.encode() * 9, codec="zstd", asbytes=True)
    with opened(written(tmp_path, packed)) as stream:
        assert stream.read() == TEXT.encode() * 9


@pytest.mark.parametrize(("pack", "kept"), [(gzip.compress, 20), (lzma.compress, 40)])
def test_a_file_that_ends_early_is_told(pack, kept, tmp_path):
    path = written(tmp_path, pack(TEXT.encode() * 99)[:kept])
    with pytest.raises(SpectuneError, match=f"cannot unpack {path}"), unpacking(path), opened(path) as stream:
        stream.read()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_lines_of_every_encoding(encoding, tmp_path):
    path = written(tmp_path, TEXT.encode(encoding))
    with opened(path) as stream:
        found = encoding_of(stream.peek(99))
        assert list(text_lines(path, stream, found)) == ["eins\n", "zwölf\n"]
    with opened(path) as stream:
        read = pieces_of(path, stream, found)
        assert "".join(iter(lambda: read(9), "")) == TEXT
    with opened(path) as stream:
        assert "".join(table_lines(path, stream, found, print)) == TEXT


def test_a_table_may_be_windows_1252(tmp_path):
    path, notes = written(tmp_path, TEXT.encode("cp1252")), []
    with opened(path) as stream:
        assert "".join(table_lines(path, stream, "utf-8-sig", notes.append)) == TEXT
    assert notes == [f"{path} is not UTF-8, and was read as Windows-1252 (cp1252)"]


def test_what_is_no_text_says_its_line(tmp_path):
    path = written(tmp_path, b"eins\nzw\xf6lf\n")
    with opened(path) as stream, pytest.raises(SpectuneError, match="line 2: not valid JSON, for it is not UTF-8"):
        list(text_lines(path, stream, "utf-8-sig"))
    with opened(path) as stream, pytest.raises(SpectuneError, match="line 2: not valid JSON, for it is not UTF-8"):
        pieces_of(path, stream, "utf-8-sig")(99)


def test_a_line_has_a_bound(tmp_path):
    path = written(tmp_path, TEXT.encode())
    with opened(path) as stream, pytest.raises(SpectuneError, match="line 2: has more than 5 bytes"):
        list(text_lines(path, stream, "utf-8-sig", 5))
    with pytest.raises(SpectuneError, match="cannot read nowhere"), unpacking(Path("nowhere")):
        raise OSError(2, "No such file or directory")

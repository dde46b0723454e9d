"""What is written goes to the file that is named, and to no other."""

import pytest

from spectune.compare.trial import Results, Trial
from spectune.errors import SpectuneError
from spectune.spectrum.ledger import Ledger
from spectune.storage import check_page_place, check_place, open_itself, write_atomically

TRIAL = Trial("svf", 1e-3, 0, "final")


@pytest.fixture
def mine(tmp_path):
    """A file that nobody may write to by another name."""
    path = tmp_path / "mine"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.mark.parametrize("mode", ["ab", "r+b", "wb"])
def test_nothing_is_written_through_a_link(tmp_path, mine, mode):
    (tmp_path / "log").symlink_to(mine)
    with pytest.raises(SpectuneError, match="log is a symbolic link, through which nothing is written"):
        open_itself(tmp_path / "log", mode)


def test_a_ledger_and_results_go_through_no_link(tmp_path, mine):
    (tmp_path / "ledger").symlink_to(mine)
    with pytest.raises(SpectuneError, match="symbolic link"):
        Ledger(tmp_path / "ledger", {"format": 1})
    results = Results(tmp_path / "trials", "x")
    (tmp_path / "trials" / f".{TRIAL.name}.attempts").symlink_to(mine)
    with pytest.raises(SpectuneError, match="symbolic link"):
        results.attempt(TRIAL)


def test_a_link_is_replaced_and_not_written_to(tmp_path, mine):
    (tmp_path / "a").symlink_to(mine)
    write_atomically(tmp_path / "a", lambda path: path.write_text("new"))
    assert (tmp_path / "a").read_text() == "new"


def test_a_file_that_is_not_there_is_made(tmp_path):
    with open_itself(tmp_path / "a", "ab") as file:
        file.write(b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    with pytest.raises(FileNotFoundError):
        open_itself(tmp_path / "none" / "a", "ab")


def test_a_write_takes_away_what_killed_ones_of_the_same_file_left(tmp_path):
    left = [tmp_path / f".{name}.{'0a' * 6}.tmp" for name in ("a[1].png", "other.png")]
    for path in left:
        path.touch()
    write_atomically(tmp_path / "a[1].png", lambda to: to.write_text("new"))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a[1].png", left[1]])


def test_a_page_takes_the_place_of_a_page_alone(tmp_path):
    data, page = tmp_path / "data.jsonl", tmp_path / "page.html"
    data.write_text('{"text": "one"}')
    page.write_text("<!DOCTYPE html>\n<html>")
    check_page_place(page)
    check_page_place(tmp_path / "new.html")
    with pytest.raises(SpectuneError, match=r"data\.jsonl exists and is no web page"):
        check_page_place(data)


def test_a_place_is_looked_at_before_the_work(tmp_path):
    check_place(tmp_path / "new" / "page.html")
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]
    (tmp_path / "file").touch()
    with pytest.raises(SpectuneError, match=r"file/page.html cannot be written .*: give another place"):
        check_place(tmp_path / "file" / "page.html")
    with pytest.raises(SpectuneError, match="new is a folder: name a file in it"):
        check_place(tmp_path / "new")

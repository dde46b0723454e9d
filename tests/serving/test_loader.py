"""The thread that reads adapters: what waits for the engine, what is undone where reading fails, and who is told."""

import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest

from serving.at_once import at_once
from serving.servers import tiny
from spectune.errors import SpectuneError
from spectune.model.names import adapter_names
from spectune.serving.jobs import Closing
from spectune.serving.loader import Loader
from spectune.serving.shelf import NameInUse, Shelf, Unreadable, Version
from transformer2.cases import adapter


@pytest.fixture
def loading():
    """Begin loaders, and end them after the test."""
    begun = []

    def begin(call=at_once, in_use=set, **settings):
        came: list[Version] = []
        told = threading.Event()
        shelf = Shelf(tiny(), **settings)
        loader = Loader(shelf, call, in_use, lambda version: (came.append(version), told.set()))
        begun.append(loader)
        return SimpleNamespace(loader=loader, shelf=shelf, came=came, told=told)

    yield begin
    for loader in begun:
        loader.stop()


def version(name, seed=1):
    return Version(name, "made", lambda: adapter("svf", seed=seed))


def test_an_adapter_gets_its_name_when_it_is_there(loading):
    at = loading()
    one = version("a")
    assert at.loader.load(one, one.read).result(30) is one
    assert at.shelf.versions == [one]
    assert adapter_names(at.shelf.model) == [one.slot]
    with pytest.raises(NameInUse, match="an adapter 'a' is loaded already"):
        at.loader.load(version("a"), lambda: pytest.fail("it was read")).result(30)
    other = version("a", seed=2)
    assert at.loader.load(other, other.read, replace=True).result(30) is other
    assert at.shelf.versions == [other]


def test_reading_waits_for_nothing_and_putting_in_place_for_the_engine(loading):
    asked = []

    def call(function):
        asked.append(threading.current_thread().name)
        return at_once(function)

    at = loading(call)

    def read():
        asked.append("read")
        return adapter("svf", seed=1)

    at.loader.load(version("a"), read).result(30)
    assert asked[0] == "read"
    assert len(asked) == 3  # to make room, and to put it in its place
    assert all(name.startswith("spectune-load") for name in asked[1:])


def test_what_cannot_be_read_or_prepared_leaves_the_shelf_as_it_was(loading):
    at = loading()

    def broken():
        raise SpectuneError("no such file")

    with pytest.raises(SpectuneError, match="no such file"):
        at.loader.load(version("a"), broken).result(30)
    changed = version("b")
    changed.digest = "another"
    with pytest.raises(Unreadable, match="the files of the adapter 'b' have changed since it was loaded"):
        at.loader.load(changed, changed.read).result(30)
    assert (at.shelf.versions, at.shelf.resident, at.shelf._reserved) == ([], 0, False)


def test_room_is_made_by_what_is_not_in_use(loading):
    used: set[Version] = set()
    at = loading(in_use=lambda: used, most=2)
    first, second, third = (version(name, seed) for seed, name in enumerate("abc", start=1))
    for one in (first, second):
        at.loader.load(one, one.read).result(30)
    used.add(first)
    at.loader.load(third, third.read).result(30)
    assert (first.slot is None, second.slot is None, third.slot is None) == (False, True, False)
    assert at.shelf.evictions == 1
    used.clear()
    at.loader.bring(second)
    assert at.told.wait(30)
    assert at.came == [second]
    assert second.slot is not None
    assert (at.shelf.reads, at.shelf.evictions) == (1, 2)
    assert {one.name for one in at.shelf.versions} == {"a", "b", "c"}  # all can be asked for still


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("the disk"), "the adapter 'a' cannot be had again: the disk"),
        (Closing("the server is being shut down"), "the server is being shut down"),
    ],
)
def test_who_waits_for_an_adapter_that_cannot_come_is_told_why(loading, error, told):
    at = loading()

    def broken():
        raise error

    gone = Version("a", "made", broken)
    at.loader.bring(gone)
    assert at.told.wait(30)
    assert at.came == [gone]
    assert str(gone.failed) == told
    assert isinstance(gone.failed, Unreadable if isinstance(error, RuntimeError) else Closing)
    assert at.shelf.reads == 0


def test_what_has_not_begun_is_not_read_any_more_after_the_end(loading):
    at = loading()
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(30)
        return adapter("svf", seed=1)

    first = at.loader.load(version("a"), slow)
    second = at.loader.load(version("b"), lambda: pytest.fail("it was read"))
    assert begun.wait(30)
    at.loader.stop()
    go_on.set()
    assert first.result(30).name == "a"
    with pytest.raises(CancelledError):
        second.result(30)

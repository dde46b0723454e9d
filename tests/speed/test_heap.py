"""What a run asks of the heap, and that it is as before afterwards."""

import importlib

import pytest

from spectune.speed import heap


@pytest.fixture
def settings(monkeypatch):
    """Read the settings again with the user's own word for one of them."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    yield importlib.reload(heap)
    monkeypatch.undo()
    importlib.reload(heap)


def test_the_heap_keeps_what_steps_free_unless_the_user_said_otherwise_and_only_while_it_is_needed(
    monkeypatch, settings
):
    asked = []
    monkeypatch.setattr(settings, "_of_glibc", lambda name: lambda *args: asked.append((name, *args)))
    with settings.memory_kept.needed():
        with settings.memory_kept.needed():
            assert asked == [("mallopt", -3, 32 << 20)]
        assert len(asked) == 1
    assert asked[1:] == [("mallopt", -3, 128 << 10), ("malloc_trim", 0)]


def test_without_glibc_nothing_happens(monkeypatch):
    def missing(name):
        raise OSError("no such library")

    monkeypatch.setattr(heap.ctypes, "CDLL", missing)
    heap._of_glibc.cache_clear()
    with heap.memory_kept.needed():
        pass
    heap.release_memory()
    heap._of_glibc.cache_clear()

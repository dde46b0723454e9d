"""What a run asks of the heap."""

from spectune.speed import heap


def test_the_heap_keeps_what_steps_free_unless_the_user_said_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "_of_glibc", lambda name: lambda *args: asked.append((name, *args)))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    heap.keep_memory()
    heap.release_memory()
    assert asked == [("mallopt", -3, 32 << 20), ("malloc_trim", 0)]


def test_without_glibc_nothing_happens(monkeypatch):
    def missing(name):
        raise OSError("no such library")

    monkeypatch.setattr(heap.ctypes, "CDLL", missing)
    heap._of_glibc.cache_clear()
    heap.keep_memory()
    heap.release_memory()
    heap._of_glibc.cache_clear()

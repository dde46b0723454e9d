"""Adapters come to the model and leave it: by room, by name, beside requests that run, and never for another one."""

import threading

import pytest
import torch

import spectune
from serving.servers import Asked, greedy, settled, tiny, words
from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.serving.batch import Batch
from spectune.serving.engine import Engine
from spectune.serving.jobs import Limits
from spectune.serving.shelf import NameInUse, Shelf, UnknownAdapter, Unreadable, Version
from transformer2.cases import adapter

METHODS = ("svf", "lora:rank=2", "dora:rank=2", "lora_xs:rank=2")


@pytest.fixture
def kept(tmp_path):
    """Return a function that makes an engine with adapters "a0", "a1", ... on disk and room for some of them."""
    engines = []

    def begun(count, most, rows=4):
        model = tiny()
        shelf = Shelf(model, most=most)
        for i in range(count):
            folder = tmp_path / f"a{i}"
            adapter(METHODS[i % len(METHODS)], seed=i + 1).save(folder)
            shelf.put(f"a{i}", Adapter.load(folder), folder, read=lambda folder=folder: Adapter.load(folder))
        engines.append(Engine(Batch(model), shelf, 0, Limits(rows=rows)))
        engines[-1].start()
        return model, shelf, engines[-1]

    yield begun
    for engine in engines:
        engine.stop(30)


def alone(i, prompt, limit):
    """Return what `generate` makes of a prompt with an adapter that was just made."""
    model = tiny()
    spectune.attach(model, adapter(METHODS[i % len(METHODS)], seed=i + 1), "it")
    return greedy(model, prompt, limit, "it")


def test_more_adapters_than_there_is_room_for_all_answer(kept):
    _, shelf, engine = kept(5, 2)
    assert shelf.resident == 2
    assert len(shelf.versions) == 5
    most = []
    step = engine.batch.step
    engine.batch.step = lambda: (most.append(shelf.resident), step())[1]
    mixtures = [{f"a{i % 5}": 1.0} if i % 4 else {f"a{i % 5}": 0.5, f"a{(i + 3) % 5}": 0.5} for i in range(14)]
    asked = [Asked(tiny(), words(), [3 + i % 2, 7], 4, weights) for i, weights in enumerate(mixtures)]
    for one in asked:
        engine.submit(one.job)
    for one in asked:
        assert one.wait().error is None
    assert settled(engine)
    assert max(most) <= 2
    assert shelf.reads >= 3
    model = tiny()
    for i in range(5):
        spectune.attach(model, adapter(METHODS[i % len(METHODS)], seed=i + 1), f"a{i}")
    for one, weights in zip(asked, mixtures, strict=True):
        assert one.rows[0].tokens == greedy(model, one.rows[0].prompt, 4, weights)


def test_an_adapter_that_a_request_runs_on_stays(kept):
    model, _, engine = kept(3, 1)
    long = Asked(model, words(), [5, 6], 60, {"a0": 1.0})
    engine.submit(long.job)
    assert long.begun.wait(30)
    others = [Asked(model, words(), [5, 6], 4, {f"a{i}": 1.0}) for i in (1, 2)]
    for one in others:
        engine.submit(one.job)
    for one in (long, *others):
        assert one.wait().error is None
    assert long.rows[0].tokens == alone(0, [5, 6], 60)
    assert [one.rows[0].tokens for one in others] == [alone(i, [5, 6], 4) for i in (1, 2)]


def test_who_waits_for_room_is_not_overtaken_for_ever(kept):
    model, _, engine = kept(2, 1)
    first = Asked(model, words(), [5, 6], 60, {"a0": 1.0})
    other = Asked(model, words(), [5, 6], 2, {"a1": 1.0})
    later = [Asked(model, words(), [5, 6], 60, {"a0": 1.0}) for _ in range(4)]
    for one in (first, other, *later):
        engine.submit(one.job)
    other.wait()
    assert not later[-1].done.is_set()
    for one in (first, *later):
        assert one.wait().error is None


def test_a_mixture_of_more_than_there_is_room_for_is_refused(kept):
    model, _, engine = kept(3, 2)
    with pytest.raises(SpectuneError, match=r"3 adapters, and 2 are held at once; .*--max-adapters"):
        engine.submit(Asked(model, words(), [5], 2, {"a0": 0.3, "a1": 0.3, "a2": 0.3}).job)


@pytest.mark.parametrize("how", ["changed", "gone", "broken"])
def test_what_cannot_be_read_again_is_said_and_never_answered_by_another(kept, tmp_path, how):
    model, _, engine = kept(2, 1)
    for one in (Asked(model, words(), [5], 2, {"a0": 1.0}), Asked(model, words(), [5], 2, {"a1": 1.0})):
        engine.submit(one.job)
        one.wait()
    weights = tmp_path / "a0" / "adapter_model.safetensors"
    before = weights.read_bytes()
    if how == "changed":
        adapter(METHODS[0], seed=50).save(tmp_path / "a0")
    elif how == "gone":
        weights.unlink()
    else:
        weights.write_bytes(before[:100])
    failed = [Asked(model, words(), [5], 2, {"a0": 1.0}) for _ in range(2)]
    good = Asked(model, words(), [5], 2, {"a1": 1.0})
    for one in (*failed, good):
        engine.submit(one.job)
    for one in failed:
        assert isinstance(one.wait().error, Unreadable)
        assert "have changed since" in str(one.error) if how == "changed" else "cannot be had again" in str(one.error)
    assert good.wait().error is None
    if how != "changed":
        weights.write_bytes(before)  # mended
        again = Asked(model, words(), [5], 4, {"a0": 1.0})
        engine.submit(again.job)
        assert again.wait().rows[0].tokens == alone(0, [5], 4)


def test_an_adapter_is_checked_beside_what_runs_and_the_batch_goes_on(kept, monkeypatch):
    model, shelf, engine = kept(1, None)
    prepare, going = shelf.prepare, threading.Event()

    def slow(*args):
        assert going.wait(60)
        return prepare(*args)

    monkeypatch.setattr(shelf, "prepare", slow)
    loaded = engine.load(Version("new", "made"), lambda: adapter("svf", seed=30))
    asked = Asked(model, words(), [5, 6], 20, {"a0": 1.0})
    engine.submit(asked.job)
    assert asked.wait().error is None  # while the other one is being checked
    with pytest.raises(UnknownAdapter):
        shelf.mixture({"new": 1.0})
    going.set()
    assert loaded.result(60).slot
    other = Asked(model, words(), [5, 6], 5, {"new": 1.0})
    engine.submit(other.job)
    other.wait()
    fresh = tiny()
    spectune.attach(fresh, adapter("svf", seed=30), "it")
    assert other.rows[0].tokens == greedy(fresh, [5, 6], 5, "it")


def test_bases_stay_while_something_that_counts_on_them_is_prepared(kept, monkeypatch):
    model, shelf, engine = kept(1, None)  # its only SVF
    prepare = shelf.prepare

    def unloaded_meanwhile(*args):
        ready = prepare(*args)
        engine.call(lambda: shelf.take("a0")).result(60)
        engine.call(lambda: None).result(60)
        return ready

    monkeypatch.setattr(shelf, "prepare", unloaded_meanwhile)
    engine.load(Version("new", "made"), lambda: adapter("svf", seed=30)).result(60)
    asked = Asked(model, words(), [5, 6], 5, {"new": 1.0})
    engine.submit(asked.job)
    assert asked.wait().error is None
    assert settled(engine)
    engine.call(lambda: None).result(60)
    assert shelf.resident == 1


def test_of_two_loads_of_one_name_one_is_told_so(kept):
    _, shelf, engine = kept(0, None)
    loads = [engine.load(Version("x", "made"), lambda i=i: adapter("lora:rank=2", seed=i)) for i in range(2)]
    assert loads[0].result(60).name == "x"
    with pytest.raises(NameInUse):
        loads[1].result(60)
    assert shelf.resident == 1


def test_a_load_that_fails_leaves_everything(kept):
    model, shelf, engine = kept(1, 1)
    other = adapter("svf", model=tiny(initializer_range=0.5))
    with pytest.raises(SpectuneError, match="another base"):
        engine.load(Version("x", "made", lambda: other), lambda: other).result(60)
    assert [version.name for version in shelf.versions] == ["a0"]
    asked = Asked(model, words(), [5, 6], 5, {"a0": 1.0})
    engine.submit(asked.job)
    assert asked.wait().rows[0].tokens == alone(0, [5, 6], 5)


def test_an_unload_while_the_adapter_is_set_aside_or_read(kept):
    model, shelf, engine = kept(2, 1)
    asked = [Asked(model, words(), [5, 6], 30, {"a0": 1.0}), Asked(model, words(), [5, 6], 5, {"a1": 1.0})]
    for one in asked:
        engine.submit(one.job)
    engine.call(lambda: [shelf.take("a0"), shelf.take("a1")]).result(60)
    for i, one in enumerate(asked):
        assert one.wait().rows[0].tokens == alone(i, [5, 6], one.rows[0].limit)
    assert settled(engine)
    engine.call(lambda: None).result(60)
    assert shelf.resident == 0


def test_weights_are_sketched_once_for_all_adapters(monkeypatch):
    from spectune.adapters import fingerprint

    model, seen = tiny(), []
    shelf = Shelf(model)
    shelf.put("a0", adapter("svf", seed=1), "made")
    computed = fingerprint._computed
    monkeypatch.setattr(fingerprint, "_computed", lambda *args: (seen.append(args), computed(*args))[1])
    shelf.put("a1", adapter("svf", seed=2), "made")
    assert not seen
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 5  # which no version counts
    with pytest.raises(SpectuneError, match="up_proj"):
        shelf.put("a2", adapter("svf", seed=3), "made")

"""The engine: whoever joins or leaves, each reply is what `generate` alone makes of the prompt."""

import threading

import pytest
import torch

import spectune
from serving.servers import Asked, greedy, scripted, settled, shelf_of, tiny, words
from spectune.errors import SpectuneError
from spectune.serving.batch import check_joining
from spectune.serving.jobs import Busy, Closing, TooSlow
from spectune.serving.sampling import Sampling
from spectune.serving.shelf import UnknownAdapter
from tiny import gemma3, gpt2, mistral
from transformer2.cases import adapter


def drawn(count, seed=0, longest=20):
    """Return prompts and limits."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest, (count, 2), generator=g).tolist()
    return [(torch.randint(3, 26, (n,), generator=g).tolist(), limit) for n, limit in sizes]


def weights(i):
    """Return one of many mixtures: none, one of eight adapters, or two of them."""
    if i % 9 == 8:
        return {}
    return {f"a{i % 8}": 1.0} if i % 3 else {f"a{i % 8}": 0.7, f"a{(i + 3) % 8}": -0.4}


def equal_to_generate(model, asked):
    for one in asked:
        row = one.rows[0]
        assert one.wait().error is None
        mixture = {version.slot: weight for version, weight in one.job.mixture.items()}
        assert row.tokens == greedy(model, row.prompt, row.limit, mixture)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_hundred_requests_over_eight_adapters_are_each_as_alone(begin, rows):
    model, tokenizer = tiny(), words()
    engine = begin(model, shelf_of(model), rows=rows)
    count = 100 if rows > 1 else 12
    asked = [Asked(model, tokenizer, p, limit, weights(i)) for i, (p, limit) in enumerate(drawn(count, longest=12))]
    threads = [threading.Thread(target=lambda part=asked[k::4]: [engine.submit(a.job) for a in part]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in asked:
        one.wait()
    assert settled(engine)
    engine.stop(30)
    equal_to_generate(model, asked)
    assert engine.batch.bytes == 0
    assert engine.tokens == sum(len(one.rows[0].tokens) for one in asked)


@pytest.mark.parametrize("make", [gemma3, mistral, gpt2])
def test_models_of_other_kinds(begin, make):
    model, tokenizer = make(), words()
    check_joining(model, tokenizer)
    engine = begin(model, rows=3)
    asked = [Asked(model, tokenizer, p, limit) for p, limit in drawn(8, longest=30)]
    for one in asked:
        engine.submit(one.job)
    for one in asked:
        one.wait()
    engine.stop(30)
    equal_to_generate(model, asked)


def test_a_long_prompt_is_read_in_parts_while_others_go_on(begin):
    model, tokenizer = tiny(), words()
    engine = begin(model, rows=4, columns=32)
    short = Asked(model, tokenizer, [5, 6], 60)
    engine.submit(short.job)
    assert short.begun.wait(30)
    long = [Asked(model, tokenizer, p * 9, 5) for p, _ in drawn(2, longest=20)]
    for one in long:
        engine.submit(one.job)
    for one in (short, *long):
        one.wait()
    engine.stop(30)
    equal_to_generate(model, [short, *long])


def test_an_adapter_that_is_replaced_or_unloaded_answers_who_began_with_it(begin):
    model, tokenizer = tiny(), words()
    shelf = shelf_of(model, 2)
    engine = begin(model, shelf)
    first = Asked(model, tokenizer, [5, 6, 7], 150, {"a0": 1.0})
    engine.submit(first.job)
    assert first.begun.wait(30)
    old = shelf.mixture({"a0": 1.0})
    engine.call(lambda: shelf.put("a0", adapter("lora:rank=2", seed=99), "made", replace=True)).result(30)
    second = Asked(model, tokenizer, [5, 6, 7], 60, {"a0": 1.0})
    engine.submit(second.job)
    engine.call(lambda: shelf.take("a0")).result(30)
    with pytest.raises(UnknownAdapter, match="did you mean 'a1'"):
        engine.submit(Asked(model, tokenizer, [5], 1, {"a0": 1.0}).job)
    assert not first.done.is_set()
    for one in (first, second):
        one.wait()
    assert settled(engine)
    engine.call(lambda: None).result(30)
    assert len(shelf._on_model) == 1  # nobody uses either version any more
    engine.stop(30)
    fresh = tiny()
    assert list(first.job.mixture) == list(old)
    for one, made in ((first, adapter("svf", seed=1)), (second, adapter("lora:rank=2", seed=99))):
        spectune.attach(fresh, made, "it")
        assert one.rows[0].tokens == greedy(fresh, [5, 6, 7], one.rows[0].limit, "it")
        spectune.detach(fresh)


def test_a_request_that_nobody_waits_for_frees_its_rows(begin):
    model, tokenizer = scripted(seconds=0.002)
    engine = begin(model, rows=2)
    left, waiting, stays = (Asked(model, tokenizer, [5], n, n=2) for n in (3000, 3000, 3))
    for one in (left, waiting):
        engine.submit(one.job)
    assert left.begun.wait(30)
    engine.cancel(waiting.job)
    engine.cancel(left.job)
    engine.submit(stays.job)
    assert stays.wait().error is None
    assert settled(engine)
    assert not left.done.is_set()
    assert len(left.rows[0].tokens) < 3000


def test_a_request_that_fails_takes_nobody_along(begin):
    model, tokenizer = tiny(), words()
    shelf = shelf_of(model, 2)
    engine = begin(model, shelf, rows=8)
    good = [Asked(model, tokenizer, p, 40, {f"a{i % 2}": 1.0}) for i, (p, _) in enumerate(drawn(4))]
    ill = Asked(model, tokenizer, [5, 6], 40, {"a0": 1e30})
    broken = Asked(model, tokenizer, [5, 6], 40)

    def fail(*_):
        raise ZeroDivisionError("by a test")

    broken.rows[0].sampler.choose = fail
    broken.rows[0].sampler.sampling = Sampling(temperature=0, logprobs=1)
    for one in (good[0], ill, good[1], broken, *good[2:]):
        engine.submit(one.job)
    assert "no number" in str(ill.wait().error)
    assert isinstance(broken.wait().error, ZeroDivisionError)
    for one in good:
        one.wait()
    again = Asked(model, tokenizer, [5, 6, 7], 10, {"a0": 1.0})  # in a place where there was no number
    engine.submit(again.job)
    again.wait()
    engine.stop(30)
    equal_to_generate(model, [*good, again])


def test_limits_are_kept(begin):
    model, tokenizer = scripted(seconds=0.002)
    engine = begin(model, rows=1, waiting=1, tokens=3500)
    running, waiting = (Asked(model, tokenizer, [5], 3000) for _ in range(2))
    engine.submit(running.job)
    assert running.begun.wait(30)
    engine.submit(waiting.job)
    with pytest.raises(Busy, match="wait already"):
        engine.submit(Asked(model, tokenizer, [5], 3).job)
    with pytest.raises(SpectuneError, match="memory holds 3500"):
        engine.submit(Asked(model, tokenizer, [5], 3500).job)
    engine.cancel(waiting.job)
    engine.cancel(running.job)
    assert settled(engine)
    slow = Asked(model, tokenizer, [5], 3000, seconds=0.2)
    engine.submit(slow.job)
    assert isinstance(slow.wait().error, TooSlow)


def test_memory_bounds_how_many_rows_run(begin):
    model, tokenizer = scripted()
    engine = begin(model, rows=8, tokens=100)
    most = []
    step = engine.batch.step
    engine.batch.step = lambda: (most.append(len(engine.batch.rows)), step())[1]
    asked = [Asked(model, tokenizer, [5], 29) for _ in range(8)]
    for one in asked:
        engine.submit(one.job)
    assert all(one.wait().error is None for one in asked)
    assert max(most) <= 3


def test_the_end_is_told_to_who_waits(begin):
    model, tokenizer = scripted(seconds=0.002)
    engine = begin(model, rows=1)
    asked = [Asked(model, tokenizer, [5], 3000) for _ in range(2)]
    for one in asked:
        engine.submit(one.job)
    assert asked[0].begun.wait(30)
    engine.stop(30)
    assert all(isinstance(one.wait().error, Closing) for one in asked)
    with pytest.raises(Closing):
        engine.submit(asked[0].job)


def test_a_seed_says_what_is_drawn_whoever_is_beside(begin):
    model, tokenizer = tiny(), words()
    engine = begin(model, shelf_of(model, 2), rows=6)
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=7)
    alone = Asked(model, tokenizer, [5, 6], 20, {"a0": 1.0}, n=2, sampling=sampling)
    engine.submit(alone.job)
    alone.wait()
    crowd = [Asked(model, tokenizer, p, 30, {f"a{i % 2}": 1.0}) for i, (p, _) in enumerate(drawn(4))]
    again = Asked(model, tokenizer, [5, 6], 20, {"a0": 1.0}, n=2, sampling=sampling)
    for one in (*crowd, again):
        engine.submit(one.job)
    for one in (*crowd, again):
        one.wait()
    said = [[row.tokens for row in one.rows] for one in (alone, again)]
    assert said[0] == said[1]
    assert said[0][0] != said[0][1]

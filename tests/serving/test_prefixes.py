"""What was read before is not read again, and only by the adapters that read it."""

import pytest
import torch

import spectune
from serving.servers import Asked, greedy, settled, shelf_of, tiny, words
from serving.test_engine import equal_to_generate
from spectune.serving.batch import Batch
from spectune.serving.engine import Engine
from spectune.serving.jobs import Limits
from spectune.serving.prefixes import BLOCK, Prefixes, mentions, origin_of
from tiny import gemma3, gpt2
from transformer2.cases import adapter


def read(begin, end):
    """Return "keys" and "values" of one layer: the numbers of the tokens."""
    return [torch.arange(begin, end, dtype=torch.float32).view(1, -1, 1)] * 2


SIZE = 2 * BLOCK * 4  # bytes of a block


def test_the_longest_beginning_is_found_but_for_the_last_token():
    kept = Prefixes(10 * SIZE)
    kept.keep("a", range(50), read)
    assert kept.bytes == 3 * SIZE
    for tokens, blocks in ((range(50), 3), (range(49), 3), (range(48), 2), (range(16), 0), (range(17), 1), ([1], 0)):
        assert len(kept.find("a", list(tokens))) == blocks
    assert [block.tensors[0][0, 0, 0] for block in kept.find("a", range(60))] == [0, 16, 32]
    assert len(kept.find("a", [*range(20), 99, *range(21, 60)])) == 1
    assert kept.find("b", range(50)) == []
    kept.keep("a", [*range(16), *range(100, 116)], read)  # what both begin with is there once
    assert kept.bytes == 4 * SIZE


def test_what_was_not_used_for_the_longest_goes_first_and_a_text_from_its_end():
    kept = Prefixes(4 * SIZE)
    kept.keep("a", range(32), read)
    kept.keep("b", range(32), read)
    kept.find("a", range(33))
    kept.keep("c", range(16), read)
    assert [len(kept.find(who, range(33))) for who in "abc"] == [2, 1, 1]
    assert kept.bytes == 4 * SIZE
    Prefixes(SIZE - 1).keep("a", range(32), read)


def test_what_an_adapter_read_goes_with_it():
    kept = Prefixes(10 * SIZE)
    for mixture in ({"x": 1.0}, {"x": 0.5, "y": 0.5}, {"y": 1.0}, {}):
        kept.keep(origin_of(mixture), range(40), read)
    kept.forget(mentions({"x"}))
    found = [len(kept.find(origin_of(m), range(40))) for m in ({"x": 1.0}, {"y": 0.5, "x": 0.5}, {"y": 1.0}, {})]
    assert found == [0, 0, 2, 2]
    assert kept.bytes == 4 * SIZE


def test_an_origin_is_who_with_which_weights():
    assert origin_of({"x": 1, "y": 0.5}) == origin_of({"y": 0.5, "x": 1.0})
    assert origin_of({"x": 1.0}) != origin_of({"x": 0.9})
    by_layer = {"x": {"a": 1.0, "b": torch.tensor(0.5)}}
    assert origin_of(by_layer) == origin_of({"x": {"b": 0.5, "a": 1.0}})
    assert origin_of(by_layer) != origin_of({"x": {"a": 1.0, "b": 0.4}})


@pytest.fixture
def begin():
    engines = []

    def begun(model, shelf, most_bytes=1 << 20):
        engines.append(Engine(Batch(model, Prefixes(most_bytes)), shelf, 0, Limits(rows=6, columns=64)))
        engines[-1].start()
        return engines[-1]

    yield begun
    for engine in engines:
        engine.stop(30)


def all_answered(engine, asked):
    for one in asked:
        engine.submit(one.job)
    for one in asked:
        one.wait()
    assert settled(engine)


@pytest.mark.parametrize("most_bytes", [1 << 20, 20000])
def test_a_system_prompt_is_read_once_for_each_mixture_and_answers_are_as_alone(begin, most_bytes):
    model, tokenizer = tiny(), words()
    g = torch.Generator().manual_seed(0)
    engine = begin(model, shelf_of(model, 2), most_bytes)
    system = torch.randint(3, 26, (70,), generator=g).tolist()
    tails = [torch.randint(3, 26, (n,), generator=g).tolist() for n in (2, 20, 9)]
    mixtures = [{}, {"a0": 1.0}, {"a0": 0.7, "a1": 0.5}]
    rounds = []
    for turn in range(2):
        order = mixtures[turn:] + mixtures[:turn]
        rounds += [[Asked(model, tokenizer, system + t, 10, m) for t, m in zip(tails, order, strict=True)]]
        all_answered(engine, rounds[-1])
    long = Asked(model, tokenizer, system + tails[0] + rounds[0][0].rows[0].tokens + [7, 8], 8)  # the talk goes on
    all_answered(engine, [long])
    known = [row.cached for asked in rounds[1:] for one in asked for row in one.rows]
    if most_bytes > 20000:
        assert sum(known) > 150
        assert long.rows[0].cached == 80
    assert engine.batch.prefixes.bytes <= most_bytes
    assert [row.cached for one in rounds[0] for row in one.rows] == [0] * 3
    engine.stop(30)
    equal_to_generate(model, [*(one for asked in rounds for one in asked), long])


@pytest.mark.parametrize("make", [gemma3, gpt2])
def test_windows_and_positions_hold_behind_what_is_known(begin, make):
    from spectune.serving.shelf import Shelf

    model, tokenizer = make(), words()
    engine = begin(model, Shelf(model))
    text = torch.randint(3, 26, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    first = [Asked(model, tokenizer, text, 5)]
    all_answered(engine, first)
    then = [Asked(model, tokenizer, [*text[:n], 5, 6], 8) for n in (40, 38, 20)] + [Asked(model, tokenizer, [7], 8)]
    all_answered(engine, then)
    assert [one.rows[0].cached > 0 for one in then] == [True, True, True, False]
    engine.stop(30)
    equal_to_generate(model, [*first, *then])


def test_an_adapter_in_another_ones_place_reads_for_itself(begin):
    model, tokenizer = tiny(), words()
    shelf = shelf_of(model, 1)
    engine = begin(model, shelf)
    text = torch.randint(3, 26, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    all_answered(engine, [Asked(model, tokenizer, text, 5, {"a0": 1.0})])
    engine.call(lambda: shelf.put("a0", adapter("lora:rank=2", seed=99), "made", replace=True)).result(30)
    again = Asked(model, tokenizer, text, 9, {"a0": 1.0})
    all_answered(engine, [again])
    assert again.rows[0].cached == 0
    engine.call(lambda: None).result(30)
    assert len({origin for origin, _ in engine.batch.prefixes._blocks if not isinstance(origin, int)}) == 1
    engine.stop(30)
    fresh = tiny()
    spectune.attach(fresh, adapter("lora:rank=2", seed=99), "it")
    assert again.rows[0].tokens == greedy(fresh, text, 9, "it")

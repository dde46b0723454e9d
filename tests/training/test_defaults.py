"""Settings that follow the data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.training.config import FOLLOWING, load_config
from spectune.training.data.encoding import Encoded
from spectune.training.defaults import by_count, by_lengths, settle, steps_of
from spectune.training.draw import Drawn, encode_needed


def config(*pairs):
    return load_config(None, ["model=m", "data=d", "output=o", *pairs])


def chosen(count, *pairs):
    return {choice.key: choice.value for choice in by_count(config(*pairs), count, FOLLOWING)}


def test_the_steps_of_a_run_are_its_batches_in_every_pass():
    assert steps_of(config("max_steps=7"), 1000, 1) == 7
    assert steps_of(config("batch_size=4", "epochs=2"), 10, 1) == 6
    assert steps_of(config("batch_size=4", "epochs=1.5"), 10, 1) == 5  # 4.5, rounded up
    assert steps_of(config("batch_size=2", "gradient_accumulation_steps=2", "epochs=1"), 17, 2) == 3


def test_few_and_many_records_both_make_a_sensible_run():
    few, many = chosen(50), chosen(200_000)
    assert (few["batch_size"], few["epochs"], few["held_out"]) == (4, 10, 0.2)
    assert (many["batch_size"], many["epochs"], many["held_out"]) == (32, 1, 0.005)
    assert chosen(340)["epochs"] == 3
    assert chosen(1)["held_out"] == 0


def test_what_is_given_stays():
    assert chosen(340, "epochs=7", "batch_size=2", "held_out=0.1", "eval_steps=5") == {}
    assert chosen(340, "max_steps=3", "held_out=0").keys() == {"batch_size"}


@given(count=st.integers(2, 500_000), steps=st.one_of(st.none(), st.integers(1, 5000)))
def test_evaluations_take_at_most_a_tenth_or_are_of_a_handful(count, steps):
    found = settle(config(), by_count(config(*([f"max_steps={steps}"] if steps else [])), count, FOLLOWING))
    held = round(found.held_out * count)
    assert 1 <= held <= max(1, count // 2)
    length = steps or round(found.epochs * count / found.batch_size)
    evaluations = 2 + (length // found.eval_steps if found.eval_steps else 0)
    learned = 2.5 * length * found.batch_size
    assert held <= 16 or held * evaluations <= 0.12 * (learned + held * evaluations)


def test_a_large_set_for_evaluation_is_sampled_so_that_evaluations_take_a_tenth():
    def measured(others, *pairs):
        found = by_count(config("eval_data=e", *pairs), 2000, FOLLOWING, others=others)
        return {choice.key: choice.value for choice in found}.get("max_eval_samples")

    steps = 3 * 2000
    assert measured(50_000) == int(2.5 * steps * 0.1 / 0.9 / 5)  # before, after and three times on the way
    assert measured(50_000, "max_steps=2") == 100
    assert measured(90) is None
    assert measured(50_000, "max_eval_samples=7") is None
    assert measured(50_000, "max_eval_samples=null") is None


def test_lengths_are_rounded_up_within_the_context():
    def length(lengths, context=4096):
        (choice,) = by_lengths(config(), lengths, context, FOLLOWING)
        return choice.value

    assert length([100, 412]) == 512
    assert length([20] * 99 + [1900]) == 64
    assert length([20] * 99 + [100]) == 128
    assert length([5000]) == 2048
    assert length([5000], 1024) == 1024
    assert by_lengths(config("max_length=9"), [5], 64, FOLLOWING) == []


@pytest.mark.parametrize("by_length", [False, True])
def test_a_short_run_encodes_what_it_needs_in_an_order_that_more_steps_go_on_with(by_length):
    def drawn(steps):
        def encode(records):
            seen.append(len(records))
            return Encoded([{"input_ids": [0] * r["n"], "n": r["n"]} for r in records if r["n"] % 7], 0, 0)

        return encode_needed(config(f"max_steps={steps}", "batch_size=2"), rows, encode, by_length=by_length)

    rows, seen = [{"n": n} for n in range(1, 2001)], []
    short, longer = drawn(3), drawn(40)
    assert isinstance(short.examples, Drawn)
    assert len(short.examples) >= 6
    assert seen[0] < 200
    assert longer.examples[: len(short.examples)] == short.examples
    assert drawn(900).examples[0]["n"] == 1

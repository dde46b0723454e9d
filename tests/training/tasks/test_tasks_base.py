"""What every task does with its data before a model is loaded: what is held out, told of, and chosen by it."""

import json

import pytest

from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.tasks import make_task
from spectune.training.tasks.base import Task
from training.folder import make_model, make_tokenizer


def lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def pairs(count, start=0):
    return [{"prompt": "say", "completion": f"ahoy {i}"} for i in range(start, start + count)]


@pytest.fixture
def task(tmp_path):
    def made(records, *more, held=None):
        given = [f"data={lines(tmp_path / 'data.jsonl', records)}"]
        given += [f"eval_data={lines(tmp_path / 'held.jsonl', held)}"] if held is not None else []
        return make_task(load_config(None, ["model=m", "output=o", *given, *more]))

    return made


def plain(records):
    return [dict(record) for record in records]


def test_a_share_is_held_out_and_the_rest_is_learned(task):
    records = pairs(20)
    learned, held = task(records, "held_out=0.25").read()
    assert (len(learned), len(held)) == (15, 5)
    assert sorted(map(str, plain([*learned, *held]))) == sorted(map(str, records))
    assert [plain(part) for part in task(records, "held_out=0.25").read()] == [plain(learned), plain(held)]
    other = task(records, "held_out=0.25", "seed=7").read()
    assert plain(other[1]) != plain(held)


def test_data_of_its_own_is_what_is_measured_on(task):
    learned, held = task(pairs(6), held=pairs(3, start=90)).read()
    assert (plain(learned), plain(held)) == (pairs(6), pairs(3, start=90))


def test_what_is_repeated_and_what_leaks_is_told(task):
    of = task([*pairs(4), *pairs(2)], held=[*pairs(1), *pairs(2, start=50)])
    of.read()
    assert "2 of 6 training records are repeated; each counts as often as it is there" in of.notes
    assert "1 of 3 held-out records are in the training data too: measures will flatter" in of.notes


def test_an_evaluation_takes_as_many_as_it_may(task):
    _, held = task(pairs(3), "max_eval_samples=5", held=pairs(40, start=50)).read()
    assert len(held) == 5
    assert all(record in pairs(40, start=50) for record in plain(held))
    _, held = task(pairs(3), "max_eval_samples=50", held=pairs(40, start=50)).read()
    assert len(held) == 40


def test_streamed_records_are_the_same_ones(task):
    learned, held = task(pairs(10), "streaming=true", held=pairs(2, start=50)).read()
    assert (plain(learned), plain(held)) == (pairs(10), pairs(2, start=50))


def test_a_record_of_another_form_is_named_with_its_place(task):
    with pytest.raises(SpectuneError, match=r"data\.jsonl, line 2"):
        task([*pairs(1), {"question": 5}]).read()


def test_the_length_follows_the_examples_where_it_is_not_given(task):
    model, tokenizer = make_model(), make_tokenizer()
    of = task(pairs(5), "held_out=0")
    records, _ = of.read()
    of.measure(records, model, tokenizer)
    longest = len(tokenizer("say ahoy 4")["input_ids"]) + 1
    assert longest <= of.config.max_length <= model.config.max_position_embeddings
    assert "max_length" in [choice.key for choice in of.choices]
    given = task(pairs(5), "held_out=0", "max_length=99")
    given.measure(given.read()[0], model, tokenizer)
    assert given.config.max_length == 99


def test_a_task_says_what_it_lacks():
    of = Task(load_config(None, ["model=m", "output=o", "data=d"]))
    none = {}
    for call in (of.problem, lambda record: of.encode([], None, None, 1), lambda record: of.sums(None, record)):
        with pytest.raises(NotImplementedError):
            call(none)
    assert (of.kind(none), of.group_rates(None), of.files(None)) == (None, {}, {})


def test_the_measure_of_a_task_that_names_none_is_the_mean_loss():
    of = Task(load_config(None, ["model=m", "output=o", "data=d"]))
    assert of.metrics({"loss": 6.0, "items": 4.0}) == {"loss": 1.5}

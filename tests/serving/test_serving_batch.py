"""What may join a batch, and steps that fail in it."""

import pytest

from serving.servers import Asked, tiny, words
from serving.test_engine import equal_to_generate
from spectune.errors import SpectuneError
from spectune.serving.batch import Batch
from tiny import t5


def test_a_model_that_cannot_go_on_with_a_text_is_refused():
    with pytest.raises(SpectuneError, match="no model that goes on with a text"):
        Batch(t5())


def test_a_step_that_fails_for_one_row_goes_on_for_the_others(begin):
    model, tokenizer = tiny(), words()
    engine = begin(model, rows=4)
    plain = type(model).forward

    def forward(*args, input_ids=None, **kwargs):
        if (input_ids[:, -1:] == 39).any():
            raise RuntimeError("39 is not liked")
        return plain(*args, input_ids=input_ids, **kwargs)

    batch_step = engine.batch.step

    def step():
        if len(ill.rows[0].tokens) == 3:
            ill.rows[0].tokens[-1] = 39
        model.forward = lambda *a, **k: forward(model, *a, **k)
        try:
            return batch_step()
        finally:
            del model.forward

    ill, good = Asked(model, tokenizer, [5, 6], 40), Asked(model, tokenizer, [7, 8], 10)
    engine.batch.step = step
    engine.batch.culprits = lambda plain=engine.batch.culprits: _with(model, forward, plain)
    engine.submit(ill.job)
    engine.submit(good.job)
    assert "39" in str(ill.wait().error)
    good.wait()
    engine.stop(30)
    equal_to_generate(model, [good])


def _with(model, forward, function):
    model.forward = lambda *a, **k: forward(model, *a, **k)
    try:
        return function()
    finally:
        del model.forward

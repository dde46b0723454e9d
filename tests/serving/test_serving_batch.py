"""What may join a batch, and steps that fail in it."""

import pytest
import torch

from serving.servers import Asked, tiny, words
from serving.test_engine import equal_to_generate
from spectune.errors import SpectuneError
from spectune.serving.batch import Batch
from spectune.serving.shelf import Shelf
from spectune.speed import dense
from tiny import t5
from transformer2.cases import adapter


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


def test_weights_stay_laid_out_while_adapters_come_and_go(begin, monkeypatch):
    monkeypatch.setattr(dense, "least_rows", lambda _: 1)
    if not dense.PackedWeight.takes(torch.ones(2, 2)):
        pytest.skip("no such products here")
    made, lay_out = [], dense.PackedWeight.__init__
    monkeypatch.setattr(dense.PackedWeight, "__init__", lambda *args: made.append(1) or lay_out(*args))
    model, tokenizer = tiny(), words()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    shelf = Shelf(model)
    engine, asked = begin(model, shelf), []
    for name in ("first", "second"):
        shelf.put(name, adapter("lora:rank=2", seed=len(name)), name)
        for weights in ({}, {name: 1.0}):
            asked.append(Asked(model, tokenizer, [5, 6], 4, weights))
            engine.submit(asked[-1].job)
            asked[-1].wait()
        engine.call(lambda: None).result()
    engine.stop(30)
    assert len(made) == len(linears)
    assert not any("forward" in vars(module) or vars(module).get("laid") for module in linears)
    equal_to_generate(model, asked)

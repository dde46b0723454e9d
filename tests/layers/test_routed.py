"""Rows with different adapters by one batched product: equal to each row's adapter alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectune
from layers.three_adapters import alone, choice, layer, routed
from methods.cases import EVERY, name
from spectune.layers import adapted
from spectune.layers import routed as routed_rows

MODELS: dict[Any, Any] = {}


@pytest.mark.parametrize("method", EVERY, ids=name)
@settings(max_examples=12, deadline=None)
@given(
    choices=st.lists(choice, min_size=1, max_size=9),
    tokens=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_each_row_is_what_its_adapter_alone_would_answer(method, choices, tokens, dtype):
    if (method, dtype) not in MODELS:
        MODELS[method, dtype] = layer(method, dtype)
    model = MODELS[method, dtype]
    x = torch.randn(len(choices), *tokens, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    near: Any = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-1}
    torch.testing.assert_close(routed(model, x, choices), alone(model, x, choices), **near)


@pytest.mark.parametrize("method", EVERY, ids=name)
def test_without_gradients_it_is_what_it_is_with_them(method, monkeypatch):
    """The two ways through a layer agree to float64's precision, and the batched one was taken."""
    model = layer(method, torch.float64)
    x = torch.randn(6, 3, 12, dtype=torch.float64)
    choices: Any = ["b", {"a": 0.25, "c": -1.25}, None, "a", {"b": torch.tensor(2.0)}, "b"]  # weights are float32 there
    with_gradients = routed(model, x, choices)
    if not name(method).removeprefix("dora:inner=").startswith("vera"):
        for module in (adapted, routed_rows):
            monkeypatch.setattr(module, "with_updates", lambda *_: pytest.fail("adapter by adapter"))
    with torch.no_grad():
        torch.testing.assert_close(routed(model, x, choices), with_gradients, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_ranks_and_scales_may_differ():
    model, x = layer("lora:rank=2"), torch.randn(5, 12)
    for adapter, method in {"wide": "lora:rank=3", "strong": "lora:rank=2,alpha=40"}.items():
        spectune.adapt(model, method, name=adapter)
        model[0].adapters[adapter][0].B.normal_()
    choices = ["wide", "a", "strong", {"strong": 0.5, "wide": 0.5, "b": 1.0}, None]
    torch.testing.assert_close(routed(model, x, choices), alone(model, x, choices))


@torch.no_grad()
def test_what_comes_to_take_w_away_goes_by_itself_in_every_pass():
    model = layer("dora:inner=lora,rank=2")
    choices = ["a", None, "b"]
    x = torch.randn(3, 12)
    with spectune.route(model, choices):
        model(x)
        (update,) = model[0].adapters["a"]
        update.A[0] = model[0].weight[3]
        update.B.zero_()
        update.B[3, 0] = -(1 - 1e-6) / update.method.inner.scale
        answers = [model(x) for _ in range(3)]
    for answer in answers:
        torch.testing.assert_close(answer, alone(model, x, choices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
@torch.no_grad()
def test_an_adapter_that_is_broken_breaks_its_own_rows_alone(method):
    model, x = layer(method), torch.randn(4, 12)
    for parameter in model[0].adapters["c"].parameters():
        parameter.fill_(float("nan"))
    y = routed(model, x, ["a", {"a": 0.5, "b": 0.5}, "c", None])
    assert y.isnan().all(1).tolist() == [False, False, True, False]
    assert not y[[0, 1, 3]].isnan().any()

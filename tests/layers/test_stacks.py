"""Rows with different adapters by one batched product: equal to each row's adapter alone, and never out of date."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import spectune
from methods.cases import EVERY, name
from spectune.layers import adapted, stacks

NAMES = ("a", "b", "c")


def layer(method, dtype=torch.float32) -> Any:
    """Return a model of one layer with three adapters, away from where they start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16)).to(dtype)
    for adapter in NAMES:
        spectune.adapt(model, method, name=adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def alone(model, x, choices):
    """Return what each row's choice answers when it is the only one."""
    rows = []
    for i, choice in enumerate(choices):
        spectune.activate(model, choice)
        rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


def routed(model, x, choices, **kept):
    with spectune.route(model, choices, **kept):
        return model(x)


weights = st.floats(-2, 2).map(lambda w: round(w, 2))
choice = st.one_of(st.none(), st.sampled_from(NAMES), st.dictionaries(st.sampled_from(NAMES), weights))
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
        for module in (adapted, stacks):
            monkeypatch.setattr(module, "with_updates", lambda *_: pytest.fail("adapter by adapter"))
    with torch.no_grad():
        torch.testing.assert_close(routed(model, x, choices), with_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
@torch.no_grad()
def test_what_changes_meanwhile_is_seen(method):
    model, x, choices = layer(method), torch.randn(3, 12), ["a", {"a": 0.5, "b": 0.5}, "c"]
    stacks: Any = {}
    with spectune.route(model, choices, stacks=stacks):
        before = model(x)
        for parameter in model[0].adapters["a"].parameters():
            parameter.mul_(1.5)
        after = model(x)
        spectune.detach(model, "c")
        without = model(x)
    assert not torch.equal(before[:2], after[:2])
    torch.testing.assert_close(after[:2], alone(model, x[:2], choices[:2]))
    torch.testing.assert_close(without[2:], nn.functional.linear(x, model[0].weight, model[0].bias)[2:])
    torch.testing.assert_close(routed(model, x, ["b", "a", None], stacks=stacks), alone(model, x, ["b", "a", None]))


@pytest.mark.parametrize("method", ["svf", "lora:rank=2"])
@torch.no_grad()
def test_contexts_that_share_what_is_kept_do_not_disturb_each_other(method):
    model, x, stacks = layer(method), torch.randn(2, 12), {}
    with spectune.route(model, ["a", "b"], stacks=stacks):
        outer = model(x)
        with spectune.route(model, ["c", "b"], stacks=stacks):
            inner = model(x)
        assert torch.equal(model(x), outer)
    torch.testing.assert_close(inner, alone(model, x, ["c", "b"]))


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "dora:rank=2"])
@torch.no_grad()
def test_an_adapter_that_is_broken_breaks_its_own_rows_alone(method):
    model, x = layer(method), torch.randn(4, 12)
    for parameter in model[0].adapters["c"].parameters():
        parameter.fill_(float("nan"))
    y = routed(model, x, ["a", {"a": 0.5, "b": 0.5}, "c", None])
    assert y.isnan().all(1).tolist() == [False, False, True, False]
    assert not y[[0, 1, 3]].isnan().any()


@torch.no_grad()
def test_what_is_kept_is_copied_once(monkeypatch):
    model, x, stacks = layer("lora:rank=2"), torch.randn(3, 12), {}
    first = routed(model, x, ["a", "b", "c"], stacks=stacks)
    monkeypatch.setattr(spectune.LoRA, "factors", lambda *_: pytest.fail("copied again"))
    torch.testing.assert_close(routed(model, x[[2, 0, 1]], ["c", "a", "b"], stacks=stacks), first[[2, 0, 1]])


@torch.no_grad()
def test_ranks_and_scales_may_differ():
    model, x = layer("lora:rank=2"), torch.randn(5, 12)
    for adapter, method in {"wide": "lora:rank=3", "strong": "lora:rank=2,alpha=40"}.items():
        spectune.adapt(model, method, name=adapter)
        model[0].adapters[adapter][0].B.normal_()
    choices = ["wide", "a", "strong", {"strong": 0.5, "wide": 0.5, "b": 1.0}, None]
    torch.testing.assert_close(routed(model, x, choices), alone(model, x, choices))


def test_inference_mode_and_then_not():
    model, x, stacks = layer("lora:rank=2"), torch.randn(2, 12), {}
    with torch.inference_mode():
        expected = routed(model, x, ["a", "b"], stacks=stacks)
    with torch.no_grad():
        model[0].adapters["a"][0].B.mul_(1.0)  # written to, so that it is copied again
        torch.testing.assert_close(routed(model, x, ["a", "b"], stacks=stacks), expected)
    with torch.inference_mode():
        made_there = layer("lora:rank=2")
        torch.testing.assert_close(routed(made_there, x, ["a", "b"]), alone(made_there, x, ["a", "b"]))

"""Several layers in one autograd node answer as they do one by one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import spectune
import tiny
from spectune.errors import SpectuneError
from spectune.layers import experts, grouped
from spectune.layers.adapted import adapted_layers

IDS = torch.arange(1, 19).reshape(2, 9)
METHODS = [
    *("lora:rank=2", "svf", "svft:pattern=banded,width=1", "pissa:rank=2", "lora_xs:rank=2"),
    *("adalora:rank=2,total_steps=9", "dora:rank=2", "dora:inner=pissa,rank=2"),
]
Found = tuple[torch.Tensor, dict[str, torch.Tensor | None]]


def adapted(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = spectune.adapt(tiny.mixtral().to(dtype), method, ["gate_up_proj", "down_proj"], **options).train()
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def step(model: Any) -> Found:
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    y = model(inputs_embeds=embedded).logits
    y.float().square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return y.detach(), {"x": embedded.grad, **grads}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each tensor of experts answered in one node; as it grows, calls are made."""
    seen: list[bool] = []

    def watched(*args: Any) -> torch.Tensor | None:
        y = grouped.together(*args)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(experts, "together", watched)
    return seen


def one_by_one(layers: Sequence[Any], x: torch.Tensor, sizes: Sequence[int], written: bool) -> None:
    """Stand in for `together`, of which every case goes the other way."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_answers_and_gradients_are_those_of_the_layers_alone(method, factored, dtype, nodes, monkeypatch):
    y, grads = step(adapted(method, dtype, factored=factored))
    assert nodes
    assert all(nodes)
    monkeypatch.setattr(experts, "together", one_by_one)
    alone, expected = step(adapted(method, dtype, factored=factored))
    exact = not method.startswith("dora")  # of which all norms are one sum
    tolerance = 0.0 if exact else 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(y, alone, atol=tolerance, rtol=tolerance)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():  # None of an expert that no token went to
        assert (grad is None) is (expected[name] is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], atol=100 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2"])
def test_gradients_of_gradients_are_those_of_the_layers_alone(method, nodes, monkeypatch):
    def second(model: Any) -> list[torch.Tensor]:
        parts = [p for p in model.parameters() if p.requires_grad]
        embedded = model.get_input_embeddings()(IDS)
        loss = model(inputs_embeds=embedded, labels=IDS).loss
        first = torch.autograd.grad(loss, parts, create_graph=True, allow_unused=True)
        total = sum((g.square().sum() for g in first if g is not None), torch.zeros(()))
        return [g for g in torch.autograd.grad(total, parts, allow_unused=True) if g is not None]

    found = second(adapted(method))
    assert all(nodes)
    monkeypatch.setattr(experts, "together", one_by_one)
    for grad, expected in zip(found, second(adapted(method)), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_gradients_through_frozen_factors_are_refused():
    model = adapted("svf")
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(SpectuneError, match="a gradient of a gradient is not there"):
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)


def test_layers_that_do_not_answer_alike_are_asked_one_by_one(nodes):
    called: list[Any] = []
    for change in ("mixture", "hook", "dropout", "weight"):
        model = adapted("lora:rank=2,dropout=0.5" if change == "dropout" else "lora:rank=2")
        layers: dict[str, Any] = dict(adapted_layers(model))
        called.clear()
        if change == "mixture":
            spectune.activate(model, {"default": 0.5})
        elif change == "hook":
            for layer in layers.values():
                layer.register_forward_hook(lambda *_: called.append(1))
        elif change == "weight":
            for name, layer in layers.items():
                layer.adapters["default"][0].weight = 2.0 if ".experts.0." in name else 1.0
        nodes.clear()
        model(IDS)
        assert nodes
        assert not any(nodes)
        assert bool(called) is (change == "hook")
    nodes.clear()
    with torch.no_grad():
        adapted("lora:rank=2")(IDS)
    assert not any(nodes)


def test_rows_of_a_magnitude_that_are_lost_among_digits_are_computed_alone(nodes):
    model = adapted("dora:rank=2")
    layer: Any = adapted_layers(model)["model.layers.0.mlp.experts.0.down_proj"]
    with torch.no_grad():
        layer.adapters["default"][0].magnitude[0] = 0
    assert torch.isfinite(model(IDS).logits).all()
    assert nodes.count(False) == 1

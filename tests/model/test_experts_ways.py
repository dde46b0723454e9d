"""Adapted experts under torch.compile and `fused`: the same answers as without."""

import copy
from typing import Any

import pytest
import torch

import spectune
import tiny
from spectune.layers.adapted import adapted_layers

IDS = torch.arange(1, 19).reshape(2, 9)


def model_with(method: str, implementation: str, *names: str) -> Any:
    model = tiny.mixtral().eval()
    model.set_experts_implementation(implementation)
    for number, name in enumerate(names):
        spectune.adapt(model, method, name=name)
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".adapters.{name}." in key:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.parametrize(("method", "implementation"), [("lora:rank=2", "grouped_mm"), ("svf", "eager")])
def test_compiled_answers_and_gradients(method, implementation):
    plain = model_with(method, implementation, "a", "b")
    compiled: Any = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    for choice in ("a", "b", {"a": 0.5, "b": 0.5}, None):
        for model in (plain, compiled):
            spectune.activate(model, choice)
        torch.testing.assert_close(compiled(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)
    grads = []
    for model in (plain, compiled):
        spectune.activate(model, "b")
        model.train()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(grad is not None for grad in grads[0])
    for one, other in zip(*grads, strict=True):
        assert (one is None) is (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["beside", "inplace"])
@pytest.mark.parametrize("method", ["lora:rank=2", "svf", "dora:rank=2"])
def test_fused_answers(method, where):
    model = model_with(method, "grouped_mm", "a", "b")
    held = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}
    for choice in ("a", {"a": 0.5, "b": -0.5}, None):
        spectune.activate(model, choice)
        with torch.no_grad():
            expected = model(IDS).logits
            with spectune.fused(model, where=where):
                torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
                if where == "beside":  # another one, within
                    spectune.activate(model, "b")
                    inside = model(IDS).logits
            if where == "beside":
                torch.testing.assert_close(model(IDS).logits, inside, atol=1e-4, rtol=1e-4)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in held.items())
    assert any(".experts." in name for name in adapted_layers(model))

"""What the first forward pass with adapters tells of weights that a model reads, where nothing could be tried."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import spectune
from layers.reading_model import Reads


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_pass_tells_where_nothing_could_be_tried(wrapped):
    model = nn.Sequential(Reads(), nn.ReLU()) if wrapped else Reads()
    before = model(x := torch.randn(3, 6))
    name = "0.read" if wrapped else "read"
    spectune.adapt(model, "lora:rank=2")
    with pytest.raises(spectune.SpectuneError, match=f"reads the weight of '{name}' itself"):
        model(x)
    with pytest.raises(spectune.SpectuneError, match=f"'{name}'"), spectune.route(model, ["default", None, None]):
        model(x)
    spectune.activate(model, None)
    torch.testing.assert_close(model(x), before)
    spectune.activate(spectune.adapt(spectune.detach(model), "lora:rank=2", exclude=["read"]), "default")
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


READS = {
    "_parameters": lambda module, x: F.linear(x, module.read._parameters["weight"]),
    "named_parameters": lambda module, x: F.linear(x, dict(module.named_parameters())["read.weight"]),
    "parameters": lambda module, x: F.linear(x, *module.read.parameters()),
    "transposed": lambda module, x: x @ next(module.read.parameters()).T,
    "state_dict": lambda module, x: F.linear(x, module.read.state_dict()["weight"]),
    "data": lambda module, x: x @ module.read._parameters["weight"].data[:].mT,
    "view": lambda module, x: F.linear(x, getattr(module, "view", None)),
}


class Takes(nn.Module):
    """Calls one layer, and takes the weight of the other past its attribute."""

    def __init__(self, way):
        super().__init__()
        self.called, self.read, self.way = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), READS[way]
        self.view = self.read.weight.detach()[:]

    def forward(self, x):
        return self.way(self, self.called(x))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("way", READS)
def test_the_first_pass_tells_of_a_weight_whatever_way_it_was_taken(way, gradients):
    x, model = torch.randn(3, 6), nn.Sequential(Takes(way), nn.ReLU())
    before = model(x)
    parameters = [k for k, p in model.named_parameters()]
    if way in ("parameters", "transposed"):  # an adapter's are there too
        model[0].way = lambda module, x: x @ next(p for n, p in module.read.named_parameters() if n == "weight").T
    spectune.adapt(model, "lora:rank=2")
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            with pytest.raises(spectune.SpectuneError, match=r"reads the weight of '0\.read' itself"):
                copy.deepcopy(model)(x) if way != "view" else model(x)
            with pytest.raises(spectune.SpectuneError, match=r"reads the weight of '0\.read' itself"):
                model(x)
        spectune.activate(model, None)
        torch.testing.assert_close(model(x), before)
    spectune.adapt(spectune.detach(model), "lora:rank=2", exclude=["read"])
    model(x)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
    spectune.adapt(spectune.detach(model), "lora:rank=2", exclude=["read"])
    spectune.detach(model)
    assert not model._forward_pre_hooks
    assert [k for k, _ in model.named_parameters()] == parameters


def test_a_first_pass_that_fails_is_no_first_pass():
    model = spectune.adapt(nn.Sequential(Takes("_parameters")), "lora:rank=2")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 5))
    with pytest.raises(spectune.SpectuneError, match=r"'0\.read'"):
        model(torch.randn(3, 6))


def test_a_model_that_calls_a_layer_and_looks_at_its_weight_as_well_is_told_once():
    class Penalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x) + 1e-3 * sum(p.square().sum() for p in self.parameters())

    model = spectune.adapt(Penalized(), "lora:rank=2")
    with pytest.warns(UserWarning, match="calls 'layer' and takes values of the weights themselves as well"):
        model(torch.randn(2, 6))
    model(torch.randn(2, 6))

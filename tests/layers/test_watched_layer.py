"""The weight of an adapted layer as others see it: it multiplies by it itself, and nobody else does."""

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import spectune
from spectune.errors import SpectuneError
from spectune.layers.reads import WatchedWeight


class Looks(nn.Module):
    """Calls one layer and does something with the weight of another in its forward pass."""

    def __init__(self, look):
        super().__init__()
        self.called, self.other, self.look = nn.Linear(4, 4), nn.Linear(4, 4), look

    def forward(self, x):
        y = self.called(x)
        found = self.look(self.other.weight, y)
        return found if isinstance(found, torch.Tensor) else y


def adapted(look, names=("a",), of=("other",)) -> Any:
    model = Looks(look)
    model.look = lambda weight, y: y
    for name in names:
        spectune.adapt(model, "lora:rank=2", list(of), name=name)
    model(torch.randn(2, 4))
    model.look = look
    return model


def test_in_a_forward_pass_of_another_it_tells_its_kind_and_no_values():
    def look(weight, y):
        assert isinstance(weight, nn.Parameter)
        assert (weight.dtype, weight.device, tuple(weight.shape)) == (torch.float32, y.device, (4, 4))
        assert torch.zeros_like(weight).sum() == 0
        return y

    model = adapted(look)
    model(torch.randn(2, 4))
    model.look = lambda weight, y: y @ weight
    with pytest.raises(SpectuneError, match=r"the model reads the weight of 'other' itself.*exclude=\['other'\]"):
        model(torch.randn(2, 4))


def test_where_no_adapter_answers_it_is_the_plain_one():
    seen = []
    model = adapted(lambda weight, y: seen.append(type(weight)), names="ab")
    x = torch.randn(2, 4)
    for choice in ("b", None, {"a": 0.0}, {"a": 0.5}):
        spectune.activate(model, choice)
        model(x)
    watched = [kind is WatchedWeight for kind in seen]
    assert watched == [True, False, False, True]
    for rows, asks in ((["a", None], True), ([None, None], False), ([{"b": 0.0}, {"a": 2.0}], True)):
        with torch.no_grad(), spectune.route(model, rows):
            model(x)
        assert (seen[-1] is WatchedWeight) == asks


def test_an_adapter_of_other_layers_is_none_here():
    seen = []
    model = adapted(lambda weight, y: seen.append(type(weight)), names=("a",), of=("called", "other"))
    spectune.detach(model)
    spectune.adapt(model, "lora:rank=2", ["called"], name="here")
    spectune.adapt(model, "lora:rank=2", ["other"], name="there")
    for name in ("here", "there"):
        spectune.activate(model, name)
        model(torch.randn(2, 4))
    assert [kind is WatchedWeight for kind in seen] == [False, True]
    assert not model.called.is_asked()
    assert model.other.is_asked()
    with spectune.route(model, ["here"]):
        assert model.other.is_asked()  # who knows which rows come


def test_outside_of_forward_passes_it_is_the_parameter_whatever_answers():
    model = adapted(lambda weight, y: y)
    weight = model.other._parameters["weight"]
    assert model.other.weight is weight
    assert dict(model.named_parameters())["other.weight"] is weight
    torch.testing.assert_close(F.linear(torch.eye(4), model.other.weight), weight.mT)


def test_its_own_forward_method_multiplies_by_it():
    class Twice(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model: Any = nn.Sequential(Twice(4, 4))
    W, bias = model[0].weight.detach().clone(), model[0].bias
    spectune.adapt(model, "lora:rank=2")
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), x @ W.mT + bias)


def test_a_weight_that_is_no_parameter_is_had_and_taken_away():
    model = adapted(lambda weight, y: y)
    own = model.other._parameters.pop("weight")  # as nn.DataParallel's replicas have it
    model.other.weight = own.detach() * 2
    torch.testing.assert_close(model.other.weight, own.detach() * 2)
    del model.other.weight
    with pytest.raises(AttributeError):
        _ = model.other.weight
    model.other._parameters["weight"] = own

"""Layers that become adapted ones in place, and afterwards are what they were."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

from spectune.layers.adapted import Adapted
from spectune.layers.selection import Selection
from spectune.layers.taking import adapted_class, answers_otherwise, give_back, take_over
from spectune.layers.unfolded import Unfolded


class Doubled(nn.Linear):
    """Does something more with what its class answers."""

    def forward(self, x):
        return super().forward(x) * 2


class ByHand(nn.Linear):
    """Multiplies by its weight itself."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * 3, self.bias)


MAKERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(4, 3),
    "conv1d": lambda: Conv1D(3, 4),
    "convolution": lambda: nn.Conv2d(4, 3, 2),
    "embedding": lambda: nn.Embedding(4, 3),
    "around": lambda: Doubled(4, 3),
    "by hand": lambda: ByHand(4, 3),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_taking_and_giving_back_leaves_nothing_behind(kind):
    layer = MAKERS[kind]()
    layer.own = "kept"
    before, parameters, cls = dict(vars(layer)), dict(layer.named_parameters()), type(layer)
    modules = dict(layer._modules)
    taken = take_over(layer, "layer", Selection())
    assert taken is layer
    assert isinstance(layer, (cls, Adapted))
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    give_back(taken)
    assert type(layer) is cls
    assert vars(layer).keys() == before.keys()
    assert layer._modules == modules
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_which_of_two_forward_methods_comes_first():
    order = [c.__name__ for c in adapted_class(Doubled).__mro__]
    assert order.index("Doubled") < order.index("Adapted")  # its own calls the adapted one by super()
    order = [c.__name__ for c in adapted_class(ByHand).__mro__]
    assert order.index("Adapted") < order.index("ByHand")  # its own is what the base answers
    assert issubclass(adapted_class(nn.Conv2d), Unfolded)


@pytest.mark.parametrize(("cls", "otherwise"), [(nn.Linear, False), (Doubled, False), (ByHand, True)])
def test_a_forward_method_that_is_no_superclass_is_known(cls, otherwise):
    assert answers_otherwise(cls(4, 3)) is otherwise

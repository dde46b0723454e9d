"""Mixtures row by row: which rows are alike, how many slices stand for each, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectune import SpectuneError
from spectune.layers.layouts import MIXED, UNTRIED, Layout, Layouts
from spectune.layers.rows import Rows


class Place:
    """As much of a layer as a choice knows: which adapters are there."""

    def __init__(self, *names: str) -> None:
        self.adapters = SimpleNamespace(_modules=dict.fromkeys(names))


def layer(*names: str) -> Any:
    return Place(*names)


def test_rows_of_one_mixture_are_one_group_and_beams_stand_beside_their_row():
    a, b = {"a": 1.0}, {"a": 0.5, "b": 0.5}
    rows = Rows([a, b, {"a": 1.0}, {}])
    assert not rows.alike
    assert rows.groups() == [(a, [0, 2]), (b, [1]), ({}, [3])]
    rows.count = 8  # two beams for each
    assert rows.groups() == [(a, [0, 1, 4, 5]), (b, [2, 3]), ({}, [6, 7])]
    assert Rows([a, {"a": 1.0}]).alike


def test_equal_parameters_are_two_choices_and_one_parameter_is_one():
    one, two = torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    assert not Rows([{"a": one}, {"a": two}]).alike  # each takes a gradient of its own
    assert Rows([{"a": one}, {"a": one}]).alike


def test_rows_may_be_the_same_in_one_layer_and_not_in_another():
    first, second = layer("a"), layer("a", "b")
    rows = Rows([{"a": {first: 1.0, second: 0.5}}, {"a": {first: 1.0, second: 0.25}}])
    assert rows.same(first)
    assert not rows.same(second)
    assert rows.layout(first, torch.zeros(2, 3)) is None
    # adapters that a layer has not make no difference in it
    assert Rows([{"c": 1.0}, {"d": 1.0}]).same(first)


def test_the_part_of_an_adapter_that_no_row_has_is_none():
    rows, place = Rows([{"a": 1.0}, {"a": 0.0, "b": 2.0}]), layer("a", "b", "c")
    part = rows.share("a", place, 2, torch.device("cpu"))
    assert part is not None
    assert part.column.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert part.rows.tolist() == [0, 1]
    assert list(part.uses) == [(0, 1.0), (1, 1.0)]
    assert rows.share("c", place, 2, torch.device("cpu")) is None
    assert rows.share("a", layer("a"), 2, torch.device("cpu")) is part  # of every layer with the same weights


def test_a_weight_that_is_zero_and_takes_a_gradient_has_a_part():
    rows = Rows([{"a": torch.tensor(0.0, requires_grad=True)}, {}])
    part = rows.share("a", layer("a"), 1, torch.device("cpu"))
    assert part is not None
    assert part.rows.tolist() == [0]
    part.weights.sum().backward()
    weight: Any = rows.mixtures[0]["a"]
    assert float(weight.grad) == 1.0


@pytest.mark.parametrize(("shape", "several"), [((5, 3), True), ((1, 3), True), ((4, 3), False), ((3,), True)])
def test_an_input_of_another_number_of_rows_is_refused(shape, several):
    rows = Rows([{"a": 1.0}, {}])
    with pytest.raises(SpectuneError, match="route was given 2 rows"):
        rows.times(layer("a"), torch.zeros(shape), Layout(several=several))


def test_slices_of_a_row_and_beams_multiply():
    rows = Rows([{"a": 1.0}, {}])
    rows.count = 4
    assert rows.times(layer("a"), torch.zeros(12, 3), Layout(several=True)) == 6
    assert rows.times(layer("a"), torch.zeros(4, 3), Layout()) == 2


def test_why_rows_cannot_be_told_apart_is_said_with_the_layers_name():
    layouts, place = Layouts(), layer("a")
    layouts.names[place] = "model.mixer"
    rows = Rows([{"a": 1.0}, {}], layouts)
    x = torch.zeros(2, 3)
    assert rows.layout(place, x) == Layout()  # the layer itself was called, with the batch
    rows.forget()
    rows.count = 2
    with pytest.raises(SpectuneError, match=f"'model.mixer', whose input has 2 axes: {UNTRIED}"):
        rows.layout(place, x)
    layouts.failure = "ValueError: no"
    with pytest.raises(SpectuneError, match=r"could not be tried with two of the rows \(ValueError: no\)"):
        rows.layout(place, x)
    layouts.places[place, 2] = MIXED
    with pytest.raises(SpectuneError, match=MIXED):
        rows.layout(place, x)

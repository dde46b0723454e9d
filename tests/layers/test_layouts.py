"""Where rows lie in a tensor: told by two rows together and alone, and taken apart and put together there."""

import pytest
import torch

from spectune.layers.layouts import GATHERED, MIXED, SEVERAL, SHARED, Layout, Layouts, Seen, where

LAYOUTS = [Layout(), Layout(1), Layout(0, several=True), Layout(0, minor=True, several=True), Layout(1, True, True)]


def batch(layout, rows, each=3):
    """Return an input whose slices are numbered, with the rows where the layout has them; and each row's own."""
    own = [torch.arange(each * 4.0).view(each, 4) + 100 * row for row in range(rows)]
    axis = torch.stack(own, 1 if layout.minor else 0).flatten(0, 1)  # slices of rows side by side, or by turns
    return (axis[None].expand(2, -1, -1).clone() if layout.axis else axis), own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_to_the_front_and_go_back(layout):
    x, own = batch(layout, 5)
    front = layout.front(x, 5)
    rows = front.unflatten(0, (5, -1))
    for row, one in zip(rows, own, strict=True):
        torch.testing.assert_close(row[:, 0] if layout.axis else row, one)
    assert torch.equal(layout.back(front, 5), x)
    assert layout.in_front == (layout.axis == 0 and not layout.minor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_rows_are_taken_and_all_are_joined_in_their_order(layout):
    x, _ = batch(layout, 5)
    parts = [layout.take(x, 5, torch.tensor(wanted)) for wanted in ([3, 0], [1, 2, 4])]
    order = torch.tensor([3, 0, 1, 2, 4]).argsort()
    assert torch.equal(layout.join(parts, [2, 3], order), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_from_two_rows_together_and_alone(layout):
    torch.manual_seed(0)
    alone = [torch.randn((2, 3, 4) if layout.axis else (3, 4)) for _ in range(2)]
    both = torch.stack(alone, layout.axis + layout.minor).flatten(layout.axis, layout.axis + 1)
    found = where(Seen.of(both, features=True), [Seen.of(one, features=True) for one in alone], 1e-4)
    assert found == layout._replace(several=True)


def test_why_rows_cannot_be_told():
    one, other = torch.ones(3, 4), 2 * torch.ones(3, 4)

    def verdict(both, *alone):
        return where(Seen.of(both), [Seen.of(x) for x in alone], 1e-4)

    assert verdict(one, one, one) == SHARED
    assert verdict(one, one, other) == MIXED
    assert verdict(torch.cat([one, one]), one, other) == MIXED
    assert verdict(torch.ones(5, 4), one, other) == GATHERED
    assert verdict(torch.ones(6, 4), one, torch.ones(2, 4)) == GATHERED


def test_masks_of_minus_infinity_are_compared():
    mask = torch.zeros(2, 3).masked_fill(torch.eye(2, 3, dtype=torch.bool), -torch.inf)
    assert where(Seen.of(mask), [Seen.of(mask[:1]), Seen.of(mask[1:])], 1e-4) == Layout()


def test_several_calls_of_a_layer_agree_or_say_that_they_do_not():
    layouts, key = Layouts(), ("a layer", 2)
    layouts.learn(key, Layout())
    layouts.learn(key, Layout(several=True))
    assert layouts.places[key] == Layout(several=True)
    layouts.learn(key, Layout(1))
    assert layouts.places[key] == SEVERAL
    layouts.learn(key, Layout())
    assert layouts.places[key] == SEVERAL


def test_one_slice_whose_number_is_small_by_chance_is_compared_by_its_size():
    probe = torch.randn(64, generator=torch.Generator().manual_seed(0))
    alone = [x - (x @ probe) / (probe @ probe) * probe for x in torch.randn(2, 64)]  # numbers of zero, but for rounding
    alone = [one[None] for one in alone]
    rounded = torch.cat(alone) * (1 + 2**-8 * torch.randn(2, 64))
    found = where(Seen.of(rounded, features=True), [Seen.of(one, features=True) for one in alone], 0.1)
    assert found == Layout()
    other = torch.cat([alone[0] + 0.5 * torch.randn(1, 64), alone[1]])
    assert where(Seen.of(other, features=True), [Seen.of(one, features=True) for one in alone], 0.1) == MIXED

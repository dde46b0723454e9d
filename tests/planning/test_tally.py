"""What operations on the meta device hold and compute, counted by hand."""

import gc
from typing import Any

import pytest
import torch

from spectune.planning.tally import Tally
from spectune.speed.pieces import pieces


class Machine:
    """A machine on which every product takes a second and every pass over memory two."""

    overhead, fresh, fp32, drawn, words = 0.5, 1e9, 1e30, 1e30, 1e30

    def __init__(self) -> None:
        self.products: list[Any] = []
        self.moved: list[int] = []

    def product(self, dtype, sides, transposed, onednn=False):
        self.products.append((sides, transposed))
        return 1.0

    def passing(self, moved, slow):
        self.moved.append(moved)
        return 2.0


@pytest.fixture
def tally():
    machine: Any = Machine()
    return Tally(machine)


def meta(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def test_a_product_is_told_by_its_sides_and_which_of_them_are_transposed(tally):
    a, b = meta(3, 4), meta(5, 4)
    with tally:
        a @ b.mT
        torch.bmm(meta(2, 3, 4), meta(2, 4, 6))
    assert tally.machine.products == [((1, 3, 4, 5), (False, True)), ((2, 3, 4, 6), (False, False))]
    assert tally.flops == 2 * 3 * 4 * 5 + 2 * 2 * 3 * 4 * 6


def test_views_hold_nothing_and_results_are_held_as_long_as_they_are_there(tally):
    x = meta(8, 8)
    with tally:
        view = x.view(64)[3:]
        assert tally.held == 0
        y = x + 1
        part = y[:4]
        del y
        gc.collect()
        assert tally.held == 8 * 8 * 4  # the view holds it all
        del part
        gc.collect()
        assert tally.held == 0
        x.add_(1)  # in place: nothing new
    assert tally.peak == tally.most == 8 * 8 * 4
    assert view.shape == (61,)


def test_what_autograd_keeps_is_held_until_the_backward_pass_is_over(tally):
    w = meta(16, requires_grad=True)
    with tally:
        y = (w * 2).exp().sum()
        gc.collect()
        kept = tally.held
        y.backward()
        del y
        gc.collect()
    assert kept >= 16 * 4  # the result of exp, which its gradient needs
    assert tally.held == 16 * 4  # the gradient
    tally.forget(w.grad)
    assert tally.held == 0
    tally.forget(w.grad)  # once
    tally.forget(None)
    assert tally.held == 0
    assert tally.most >= tally.peak


def test_what_is_forgotten_counts_among_the_most_alone(tally):
    x, y = meta(100), meta(50)
    with tally:
        first = x + 1
        tally.forget(first)
        second = y + 1
    assert tally.held == 200
    assert tally.most == 600
    del first, second


def test_pieces_are_counted_as_many_times_as_they_are_and_computed_once(tally):
    with tally:
        for some in pieces(12, 3):
            meta(4, 5) @ meta(5, some.stop - some.start)
    assert tally.flops == 4 * (2 * 4 * 5 * 3)
    assert len(tally.machine.products) == 1


def test_an_expanded_tensor_moves_what_it_holds(tally):
    x = meta(1, 100)
    with tally:
        x.expand(50, 100) + 0.0
    (moved,) = tally.machine.moved
    assert moved == 100 * 4 + 50 * 100 * 4
    with tally:
        x.new_empty(7)
    assert tally.machine.moved[-1] == 0


def test_picking_rows_moves_these_and_not_the_table(tally):
    rows, table = torch.zeros(6, dtype=torch.int64, device="meta"), meta(1000, 4)
    with tally:
        torch.nn.functional.embedding(rows, table)
    (moved,) = tally.machine.moved
    assert moved == 3 * 6 * 8  # the smallest of indices, rows and table, for each of the three


def test_nothing_is_counted_afterwards(tally):
    with tally:
        meta(3) + 1
    before = tally.seconds, tally.flops, tally.held
    meta(3) + 1
    assert (tally.seconds, tally.flops, tally.held) == before

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectune.planning.machine import Machine
from spectune.planning.tally import Tally
from spectune.speed.pieces import counted, pieces


@given(st.integers(0, 50), st.integers(1, 60))
def test_every_row_is_in_one_piece(count, step):
    assert [i for piece in pieces(count, step) for i in range(count)[piece]] == list(range(count))
    assert len(list(pieces(count, step))) == max(1, -(-count // step))


@given(st.integers(0, 50), st.integers(1, 60))
def test_who_counts_is_told_how_often_each_would_be_done(count, step):
    times, rows = [1], []

    @contextmanager
    def repeated(n):
        times.append(n)
        yield
        times.pop()

    token = counted.set(repeated)
    try:
        for piece in pieces(count, step):
            rows.append(times[-1] * len(range(count)[piece]))
    finally:
        counted.reset(token)
    assert sum(rows) == count
    assert len(rows) <= 2


@pytest.mark.parametrize("count", [1, 7, 64, 66])
def test_what_is_counted_once_costs_what_all_of_it_does(count):
    def work(alone):
        with Tally(Machine()) as tally:
            token = counted.set(None) if alone else None
            x = torch.empty(count, 32, device="meta")
            for rows in pieces(count, 3):
                for some in pieces(len(x[rows]), 2):
                    (x[rows][some] @ x[rows][some].mT).exp()
            if token is not None:
                counted.reset(token)
        return tally.flops, tally.seconds

    assert work(True) == pytest.approx(work(False))

"""Timing by a clock that is told what to say, and the stand-ins that are timed."""

import pytest
import torch

from spectune import PiSSA
from spectune.planning import probe


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves on only when it is told to."""
    state = [0.0]
    monkeypatch.setattr(probe, "clock", lambda: state[0])
    return state


def runs(clock, *seconds):
    """Return a run that takes these seconds, one call after the other, and the calls."""
    left, calls = list(seconds), []

    def run():
        calls.append(1)
        clock[0] += left.pop(0) if left else 0.001

    return run, calls


@pytest.mark.parametrize(
    ("seconds", "typical", "count"),
    [
        pytest.param([0.009, 0.001, 0.003, 0.002, 0.005, 0.001], 0.002, 6, id="the median of those behind the first"),
        pytest.param([1.0] * 6, 1.0, 2, id="long ones are few: one to warm up"),
        pytest.param([5.0] + [0.001] * 5, 0.001, 6, id="a first one that only compiles makes it no long one"),
    ],
)
def test_what_is_typical_of_runs(clock, seconds, typical, count):
    run, calls = runs(clock, *seconds)
    assert probe.typical(run) == pytest.approx(typical)
    assert len(calls) == count


def test_what_takes_no_time_at_all_takes_some(clock):
    run, _ = runs(clock, *[0.0] * 6)
    assert probe.typical(run) > 0  # rates are divided by it


def test_a_stand_in_is_drawn_alike_and_has_a_head_above_its_bulk():
    W = probe.stand_in(96, 160)
    assert torch.equal(W, probe.stand_in(96, 160))
    S = torch.linalg.svdvals(W)
    assert float(S[0]) > 2.5 * float(S[96 // 2])
    assert float(S[-1]) > 0
    assert probe.stand_in(3, 5).shape == (3, 5)


def test_threads_are_given_back_whatever_happens(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(probe, "typical", lambda run, times: seen.append(torch.get_num_threads()) or 1.0)
    assert probe.decomposition("top", 2, 8, 8) == 1.0
    assert seen == [1]
    monkeypatch.setattr(probe, "typical", lambda run, times: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.decomposition("top", 2, 8, 8)
    assert torch.get_num_threads() == before


def test_a_basis_is_timed_on_weights_with_less_room_than_the_rank():
    each, more = probe.basis(PiSSA(rank=64), 12, 20)
    assert each > 0
    assert more >= 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_products_are_of_the_layout_that_is_asked_for(monkeypatch, batch, left, right):
    seen = []
    monkeypatch.setattr(torch, "matmul", lambda a, b: seen.append((a, b)))
    probe.product("torch.float32", batch, 4, 5, 6, left, right)
    a, b = seen[0]
    front = (batch,) if batch > 1 else ()
    assert (tuple(a.shape), tuple(b.shape)) == ((*front, 4, 5), (*front, 5, 6))
    assert (a.stride(-1) != 1, b.stride(-1) != 1) == (left, right)
    assert len({b.data_ptr() for _, b in seen}) == len(seen)  # from memory each time, as weights come

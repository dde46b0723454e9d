"""Modules that answer the rows of one choice at a time, where a layer in them has no rows of its own."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
from model.test_row_trial import Around, adapted, check, ids
from spectune import SpectuneError


class Experts(nn.Module):
    """Tokens go to the one of four layers that their first feature picks, or to none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        flat = x.reshape(-1, 8)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = ((flat[:, 0] * 10).long() % 5 == i).nonzero()[:, 0]
            y = y.index_add(0, chosen, expert(flat[chosen]))
        return y.view_as(x)


class Positions(nn.Module):
    """Every row meets the same projected positions."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.places, self.project, self.extra = nn.Parameter(torch.randn(1, 64, 8)), nn.Linear(8, 8), extra

    def forward(self, x):
        y = x * self.project(self.places[:, : x.shape[1]])
        return y if self.extra is None else (y, self.extra)[0]


class Columns(nn.Module):
    """Rows and positions flattened into one axis, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        y = self.project(x.transpose(0, 1).reshape(-1, 8))
        return y.view(x.shape[1], x.shape[0], 8).transpose(0, 1)


@pytest.mark.parametrize("same", [False, True], ids=["prompts", "one prompt"])
@pytest.mark.parametrize("middle", [Experts, Positions, Columns])
def test_parts_that_have_no_rows_in_front(middle, same):
    torch.manual_seed(0)
    model = adapted(Around(middle()))
    batch = ids()[:1].repeat(4, 1) if same else ids()
    check(model, model, batch)
    for rows, length in ((2, 6), (4, 4), (3, 1), (4, 9)):
        check(model, model, ids(rows, length))


def test_gradients_of_rows_that_are_answered_apart():
    torch.manual_seed(0)
    model = adapted(Around(Experts()))
    batch, weights = ids(), torch.randn(4, 6, 8)
    trained = {n: p.requires_grad_(True) for n, p in model.named_parameters() if ".adapters." in n}
    choices = ["a", "b", "a", None]
    with spectune.route(model, choices):
        (model(batch) * weights).sum().backward()
    routed = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    model.zero_grad()
    for i, choice in enumerate(choices[:3]):
        spectune.activate(model, choice)
        (model(batch[i : i + 1]) * weights[i : i + 1]).sum().backward()
    assert set(routed) == {n for n, p in trained.items() if p.grad is not None}
    for name, grad in routed.items():
        torch.testing.assert_close(grad, trained[name].grad, rtol=1e-3, atol=1e-4)


def test_a_layer_without_rows_that_no_module_can_answer_apart_is_refused_by_name():
    torch.manual_seed(0)
    model = adapted(Around(Positions()))
    shared = model.middle
    model.forward = lambda x: model.last(model.embed(x) * shared.project(shared.places[:, : x.shape[1]]))
    with spectune.route(model, ["a", "b"]), pytest.raises(SpectuneError, match=r"'middle\.project'.*serves them all"):
        model(ids(2))
    assert model(ids(2)).shape == (2, 6, 8)

"""LoRA's start and scale, from arXiv 2106.09685, and a table's."""

import math

import pytest
import torch
import torch.nn as nn
from starts import start_of, weight

import spectune
from spectune import LoRA


def test_a_starts_kaiming_uniform_and_b_at_zero():
    W = weight(40, 300)
    torch.manual_seed(5)
    _, t = start_of(LoRA(rank=64), W)
    assert t["A"].shape == (64, 300)
    assert t["B"].shape == (40, 64)
    assert not t["B"].any()
    torch.manual_seed(5)  # the same draws, by torch's own name for the distribution
    expected = nn.init.kaiming_uniform_(torch.empty(64, 300), a=math.sqrt(5))
    torch.testing.assert_close(t["A"].float(), expected)


@pytest.mark.parametrize(
    ("method", "s"), [(LoRA(4, alpha=6), 1.5), (LoRA(4, alpha=6, rslora=True), 3.0), (LoRA(), 2.0)]
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(method, s):
    assert method.scale == s


def test_a_row_of_a_table_that_no_batch_holds_stays_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3))
    before = model[0].weight.detach().clone()
    spectune.adapt(model, LoRA(rank=2), targets=["0"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[1, 4, 4]])).square().sum().backward()
        optimizer.step()
    after = spectune.merge(model)[0].weight
    moved = (after != before).any(1).nonzero()[:, 0].tolist()
    assert moved == [1, 4]

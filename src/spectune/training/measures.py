"""Measures of an evaluation's predictions."""

from __future__ import annotations

import torch
from torch import Tensor


def f1(right: Tensor, said: Tensor, there: Tensor) -> Tensor:
    """Return F1 = 2 TP / (said + there), of those classes that are said or there.

    Args:
        right: TP, how often each class was said where it is (classes).
        said: how often it was said.
        there: how often it is there.
    """
    return (2 * right / (said + there))[said + there > 0]


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Pearson's correlation of two rows of numbers, zero where one of them does not vary."""
    a, b = one.double() - one.double().mean(), other.double() - other.double().mean()
    size, rounding = float(a.norm() * b.norm()), 1e-12 * float(one.double().norm() * other.double().norm())
    return float(a @ b) / size if size > rounding else 0.0


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation: that of ranks, equal numbers sharing the mean of theirs."""
    return correlation(_ranks(one), _ranks(other))


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[place]

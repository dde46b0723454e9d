"""The cross-entropy method and gradient ascent on objectives whose best weights are known."""

import pytest
import torch

from spectune import SpectuneError
from spectune.transformer2.search import cross_entropy_method, gradient_ascent

TARGET = torch.tensor([[0.2, 0.9, 0.5], [1.0, 0.0, 0.4]])


def closeness(weights):
    return -(weights - TARGET).square().sum((-1, -2))


def test_cross_entropy_method_finds_the_best_weights():
    found = cross_entropy_method(lambda w: closeness(w)[:, None], (2, 3), population=64, elites=12, iterations=60)
    torch.testing.assert_close(found.weights, TARGET, atol=0.05, rtol=0)
    assert found.history == sorted(found.history)
    assert found.evaluations == 64 * len(found.history)


def test_gradient_ascent_finds_them_too_and_stays_within_bounds():
    def objective(weights):
        score = closeness(weights) + 5 * weights[1, 0]  # pulls beyond 1
        score.backward()
        return score.detach()

    found = gradient_ascent(objective, (2, 3), iterations=80)
    torch.testing.assert_close(found.weights, TARGET, atol=0.05, rtol=0)
    assert found.history == sorted(found.history)


def test_every_weight_that_is_tried_is_between_0_and_1_and_the_anchors_are_tried():
    seen = []

    def evaluate(weights):
        seen.append(weights.clone())
        return closeness(weights)[:, None]

    cross_entropy_method(evaluate, (2, 3), population=10, elites=2, iterations=3)
    assert all(((w >= 0) & (w <= 1)).all() for w in seen)
    first = seen[0]
    assert torch.equal(first[0], torch.full((2, 3), 1 / 3))
    assert all(torch.equal(first[1 + k], torch.eye(3)[k].expand(2, -1)) for k in range(3))
    assert not first[4].any()


def test_ties_are_broken_by_the_second_score():
    def evaluate(weights):
        return torch.stack([torch.ones(len(weights)), closeness(weights)], dim=1)

    found = cross_entropy_method(evaluate, (2, 3), population=64, elites=12, iterations=60)
    torch.testing.assert_close(found.weights, TARGET, atol=0.05, rtol=0)


def test_it_stops_when_the_distribution_has_narrowed():
    found = cross_entropy_method(lambda w: closeness(w)[:, None], (2, 3), iterations=1000, tolerance=0.2)
    assert len(found.history) < 100


def test_what_is_not_a_number_never_wins():
    def evaluate(weights):
        scores = closeness(weights)[:, None]
        scores[weights.sum((1, 2)) < 1.5] = torch.nan
        scores[0] = torch.nan
        return scores

    found = cross_entropy_method(evaluate, (2, 3), population=64, elites=12, iterations=60)
    torch.testing.assert_close(found.weights, TARGET, atol=0.05, rtol=0)
    with pytest.raises(SpectuneError, match="the likelihood of the shots became nan"):
        gradient_ascent(lambda w: w.sum() * torch.nan, (2, 3))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed):
    runs = [cross_entropy_method(lambda w: closeness(w)[:, None], (2, 3), iterations=4, seed=s) for s in (seed, 0)]
    assert torch.equal(runs[0].weights, runs[1].weights) == (seed == 0)

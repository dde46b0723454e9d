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
    assert found.evaluations == 64 * len(found.history) + 5  # and the anchors


def test_gradient_ascent_finds_them_too_and_stays_within_bounds():
    def objective(weights):
        score = closeness(weights) + 5 * weights[1, 0]  # pulls beyond 1
        score.backward()
        return score.detach()

    found = gradient_ascent(objective, (2, 3), iterations=80)
    torch.testing.assert_close(found.weights, TARGET, atol=0.05, rtol=0)
    assert found.history == sorted(found.history)


@pytest.mark.parametrize("anchors", [True, False])
def test_every_weight_that_is_tried_is_between_0_and_1_and_the_anchors_are_tried(anchors):
    seen = []

    def evaluate(weights):
        seen.append(weights.clone())
        return closeness(weights)[:, None]

    found = cross_entropy_method(evaluate, (2, 3), population=10, elites=2, iterations=3, anchors=anchors)
    assert all(((w >= 0) & (w <= 1)).all() for w in seen)
    assert [len(w) for w in seen] == [15 if anchors else 10, 10, 10]
    assert found.evaluations == sum(len(w) for w in seen)
    assert torch.equal(seen[0][0], torch.full((2, 3), 1 / 3))
    if anchors:
        first = seen[0][10:]
        assert torch.equal(first[0], torch.full((2, 3), 1 / 3))
        assert all(torch.equal(first[1 + k], torch.eye(3)[k].expand(2, -1)) for k in range(3))
        assert not first[4].any()
    best = max(torch.cat(seen[:2]), key=closeness)
    assert torch.equal(seen[2][0], best)  # once more


def test_the_distribution_is_the_elites_with_n_minus_one():
    """From the first generation to the second, with the same draws."""
    seen = []

    def evaluate(weights):
        seen.append(weights.clone())
        return closeness(weights)[:, None]

    cross_entropy_method(evaluate, (2, 3), population=40, elites=7, iterations=2, seed=3)
    drawn = torch.Generator().manual_seed(3)
    torch.randn(40, 2, 3, generator=drawn)
    first = seen[0][:40]  # anchors are no elites, however good they are
    elite = first[closeness(first).topk(7).indices]
    mean = elite.sum(0) / 7
    std = ((elite - mean).square().sum(0) / 6).sqrt()
    second = (mean + std * torch.randn(40, 2, 3, generator=drawn)).clamp(0, 1)
    torch.testing.assert_close(seen[1][1:], second[1:], rtol=1e-5, atol=1e-6)


def test_one_elite_ends_the_search():
    found = cross_entropy_method(lambda w: closeness(w)[:, None], (2, 3), elites=1, anchors=False)
    assert found.evaluations == 32


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

"""The search for a few weights: the cross-entropy method, and gradient ascent where the objective has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spectune.errors import SpectuneError

Progress = Callable[[int, int, float], None]


class Found(NamedTuple):
    """What a search found.

    Args:
        weights: the best weights that were tried.
        score: their score; the first entry counts, the others break ties.
        history: the best score after each iteration.
        evaluations: how many weights were tried.
    """

    weights: Tensor
    score: Tensor
    history: list[float]
    evaluations: int


def cross_entropy_method(
    evaluate: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    *,
    population: int = 32,
    elites: int = 6,
    iterations: int = 100,
    std: float = 0.5,
    anchors: bool = True,
    tolerance: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Maximise over weights in [0, 1] as Transformer-squared does (arXiv 2501.06252).

    Weights are drawn from a normal distribution of mean 1/K and standard deviation `std`, clamped, and scored; the
    distribution becomes that of the elites (mean, and standard deviation with n - 1), and the best so far is tried
    again with the next generation, as in the authors' code.  What is more is `anchors`: the uniform mixture, each
    adapter alone and none are tried beside the first generation, so that what is found is at least as good as those on
    the shots.  They do not count as elites, whose distribution they would bend (`benchmarks/cem.py`).

    Args:
        evaluate: weights (n x G x K) -> scores (n x s); the first column counts, the others break ties.
        shape: groups of layers G, adapters K.
        population: weights tried in an iteration.
        elites: the best of them, whose mean and standard deviation go on.
        iterations: at most.
        std: at the start.
        anchors: whether the K + 2 are tried as well; else the first generation holds the uniform mixture.
        tolerance: stop where no standard deviation is above this.
        seed: of the draws.
        progress: called as progress(iteration, iterations, best score).
    """
    groups, count = shape
    drawn = torch.Generator().manual_seed(seed)
    mean, spread = torch.full(shape, 1.0 / count), torch.full(shape, std)
    alone = torch.stack([mean, *torch.eye(count)[:, None].expand(-1, groups, -1), torch.zeros(shape)])
    best, best_score, history, evaluations = mean, None, [], 0
    for iteration in range(iterations):
        tried = (mean + spread * torch.randn(population, *shape, generator=drawn)).clamp(0, 1)
        tried[0] = best
        if beside := len(alone) if anchors and iteration == 0 else 0:
            tried = torch.cat([tried, alone])
        scores = evaluate(tried).nan_to_num(nan=-torch.inf)  # what overflows is the worst, not the best
        evaluations += len(tried)
        order = sorted(range(len(tried)), key=lambda i: tuple(scores[i].tolist()), reverse=True)
        top = order[0]
        if best_score is None or tuple(scores[top].tolist()) > tuple(best_score.tolist()):
            best, best_score = tried[top].clone(), scores[top]
        history.append(float(best_score[0]))
        elite = tried[[i for i in order if i < len(tried) - beside][:elites]]
        mean, spread = elite.mean(0), elite.std(0, unbiased=elites > 1)
        if progress is not None:
            progress(iteration + 1, iterations, history[-1])
        if float(spread.max()) <= tolerance:
            break
    assert best_score is not None
    return Found(best, best_score, history, evaluations)


def gradient_ascent(
    objective: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    *,
    iterations: int = 30,
    lr: float = 0.1,
    progress: Progress | None = None,
) -> Found:
    """Maximise over weights in [0, 1] by Adam, projected after each step, from the uniform mixture.

    Args:
        objective: weights (G x K) -> the score (), whose gradient has been added to theirs.
        shape: groups of layers G, adapters K.
        iterations: steps.
        lr: learning rate, which falls to zero linearly.
        progress: called as progress(iteration, iterations, best score).
    """
    weights = torch.full(shape, 1.0 / shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=lr, maximize=True)
    best, best_score, history = weights.detach().clone(), None, []
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
        optimizer.zero_grad()
        score = objective(weights)
        if not score.isfinite():
            raise SpectuneError(f"the likelihood of the shots became {score.item()}: load the model in bf16 or fp32")
        if best_score is None or float(score) > best_score:
            best, best_score = weights.detach().clone(), float(score)
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(0, 1)
        history.append(best_score)
        if progress is not None:
            progress(iteration + 1, iterations, best_score)
    return Found(best, torch.tensor([best_score]), history, iterations)

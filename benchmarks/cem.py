"""The cross-entropy method for mixing weights: ours, the authors', and what lies between, without a model.

    python benchmarks/cem.py

For each objective and seed every variant searches with the same draws; less is better, zero is the optimum but for `ten
shots`.  A variant is: the standard deviation of the elites with n - 1 or with n; what is tried again with the next
generation; and the anchors (the uniform mixture, each adapter alone, none): without them, in the place of draws of the
first generation, or beside it and not among the elites.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from _machine import save
from spectune.transformer2.search import cross_entropy_method

Objective = Callable[[Tensor], Tensor]
SHAPES = [(1, 3), (1, 8), (4, 3), (12, 3)]
OURS = (True, "best", "beside")
AUTHORS = (True, "best", "none")


def objectives(seed: int) -> Iterator[tuple[str, tuple[int, int], Objective]]:
    """Return losses (n) of weights (n x G x K): name, shape and function."""
    drawn = torch.Generator().manual_seed(1000 + seed)
    for shape in SHAPES:
        size = shape[0] * shape[1]
        target, skew = torch.rand(shape, generator=drawn), torch.randn(size, size, generator=drawn) / size**0.5
        shots = torch.rand(10, size, generator=drawn)
        corner, first = (target > 0.6).float(), torch.eye(shape[1])[0].expand(shape)

        def near(w: Tensor, t: Tensor) -> Tensor:
            return (w - t).square().mean((-1, -2))

        def solved(w: Tensor, t: Tensor, shots: Tensor) -> Tensor:  # a share of ten, which some weights decide each
            return torch.sigmoid(30 * (((w - t).flatten(1).square()[:, None] * shots).mean(-1) - 0.05)).mean(1)

        yield "interior", shape, lambda w, t=target: near(w, t)
        yield "tilted", shape, lambda w, t=target, A=skew: ((w - t).flatten(1) @ A).square().mean(1)
        yield "corner", shape, lambda w, t=corner: near(w, t)
        yield "one adapter", shape, lambda w, t=first: near(w, t)
        yield "ten shots", shape, lambda w, t=target, s=shots: solved(w, t, s)


def variant(loss: Objective, shape: tuple[int, int], seed: int, unbiased: bool, again: str, anchors: str) -> Any:
    """Search as a variant does, and return the best loss and how many weights were tried."""
    drawn = torch.Generator().manual_seed(seed)
    mean, std = torch.full(shape, 1 / shape[1]), torch.full(shape, 0.5)
    alone = torch.stack([mean, *torch.eye(shape[1])[:, None].expand(-1, shape[0], -1), torch.zeros(shape)])
    best, least, count = mean, float("inf"), 0
    for generation in range(100):
        tried = (mean + std * torch.randn(32, *shape, generator=drawn)).clamp(0, 1)
        if generation == 0 and anchors == "in place":
            tried[: len(alone)] = alone
        elif again != "nothing":
            tried[0] = best if again == "best" else mean
        losses = loss(tried)
        elite = tried[losses.topk(6, largest=False).indices]
        if generation == 0 and anchors == "beside":
            tried = torch.cat([tried, alone])
            losses = loss(tried)
        count += len(tried)
        if float(losses.min()) < least:
            best, least = tried[losses.argmin()], float(losses.min())
        mean, std = elite.mean(0), elite.std(0, unbiased=unbiased)
        if std.max() <= 1e-2:
            break
    return least, count


def main() -> None:
    """Search, and write the mean of the losses by kind of objective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    searches = list(itertools.product((False, True), ("mean", "best", "nothing"), ("none", "in place", "beside")))
    found: dict[Any, dict[str, list[float]]] = {key: {} for key in [*searches, "spectune"]}
    for seed in range(given.seeds):
        for name, shape, loss in objectives(seed):
            for key in searches:
                least, count = variant(loss, shape, seed, *key)
                found[key].setdefault(name, []).append(least)
                found[key].setdefault("evaluations", []).append(count)
            own = cross_entropy_method(lambda w, loss=loss: -loss(w)[:, None], shape, seed=seed)
            found["spectune"].setdefault(name, []).append(-float(own.score[0]))
            found["spectune"].setdefault("evaluations", []).append(own.evaluations)
    rows = []
    for key, by_name in found.items():
        about = dict(zip(("unbiased", "again", "anchors"), OURS if key == "spectune" else key, strict=True))
        who = "spectune" if key == "spectune" else "authors" if key == AUTHORS else None
        rows.append({**about, "who": who, **{name: statistics.mean(values) for name, values in by_name.items()}})
        print(*rows[-1].values())
    save("cem", {"seeds": given.seeds, "shapes": SHAPES, "results": rows})


if __name__ == "__main__":
    main()

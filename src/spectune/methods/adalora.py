"""AdaLoRA: adaptive budget allocation (arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.cores import Diagonal
from spectune.layers.factors import Factors
from spectune.layers.updates import Update
from spectune.methods._adalora_schedule import BudgetSchedule
from spectune.methods.base import Method, Shapes, Tensors, check_choice, check_int, check_range
from spectune.methods.registry import register


@register
@dataclass(frozen=True)
class AdaLoRA(Method):
    """Prune an SVD-like update to a budget: W' = W + s P diag(E) Q, s = alpha / initial_rank.

    E starts at zero, P and Q at N(0, 0.02).  Every triplet is scored by smoothed sensitivity times uncertainty, and
    over the whole model the best b(t) keep their E: b(t) falls from `initial_rank` a layer to `rank` a layer along
    a cubic between t_init and total_steps - t_final.  gamma times the mean of ||P^T P - I||_F and ||Q Q^T - I||_F over
    all P and Q of the model is part of the loss, through its gradient.  All of it happens at each optimizer step by
    itself.

    Args:
        rank: average rank a layer at the end.
        initial_rank: rank at the start; None is 1.5 rank. Layers with fewer rows or columns, where P or Q could not be
            orthonormal, have as much as they can, and a budget of their own.
        alpha: numerator of the scale.
        t_init: steps before pruning; a fraction of the run below 1.
        t_final: steps after it, at the final budget; a fraction of the run below 1.
        interval: steps between two allocations.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of the uncertainty.
        gamma: weight of the orthogonality term.
        penalty: the orthogonality term: "mean_norm", the authors' code, which gamma is chosen for, or
            "sum_of_squares", the paper's formula, with a gradient some thousand times as large.
        total_steps: length of the run; None takes it from transformers.Trainer or spectune's trainer, and without
            either nothing is pruned.
        dropout: probability of dropping an input of the branch in training.

    Raises:
        SpectuneError: a field out of its range, named.
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "arXiv:2303.10512"
    summary: ClassVar[str] = "W + s P diag(E) Q, pruned to a budget over the model; P, E and Q train"
    learning_rate: ClassVar[float] = 2e-3
    earlier: ClassVar[Mapping[str, object]] = {"penalty": "sum_of_squares"}

    rank: int = 8
    initial_rank: int | None = None
    alpha: float = 16
    t_init: float = 0.1
    t_final: float = 0.3
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    penalty: str = "mean_norm"
    total_steps: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "rank", "interval")
        if self.initial_rank is not None:
            check_int(self, "initial_rank", least=self.rank)
        check_range(self, "alpha", 0, open_low=True)
        for name in ("t_init", "t_final", "gamma"):
            check_range(self, name, 0)
        for name in ("beta1", "beta2", "dropout"):
            check_range(self, name, 0, 1)
        check_choice(self, "penalty", ("mean_norm", "sum_of_squares"))
        if self.total_steps is not None:
            check_int(self, "total_steps")
            if self.steps(self.t_init) + self.steps(self.t_final) >= self.total_steps:
                raise SpectuneError(
                    f"t_init + t_final of AdaLoRA must be below total_steps ({self.total_steps}), "
                    f"not {self.t_init} + {self.t_final}"
                )

    @property
    def first_rank(self) -> int:
        """The rank at the start."""
        return self.initial_rank if self.initial_rank is not None else -(-3 * self.rank // 2)

    def steps(self, t: float) -> int:
        """Return `t_init` or `t_final` as a number of steps of a run of `total_steps`."""
        return round(t * (self.total_steps or 0)) if t < 1 else int(t)

    def fit(self, out_features: int, in_features: int) -> AdaLoRA:
        limit = min(out_features, in_features)
        if self.first_rank <= limit:
            return self
        rank, alpha = min(self.rank, limit), self.alpha * limit / self.first_rank
        return replace(self, rank=rank, initial_rank=limit, alpha=alpha)

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        return {"P": (out_features, self.first_rank), "E": (self.first_rank,), "Q": (self.first_rank, in_features)}

    def initial(self, shapes: Shapes, basis: Tensors) -> dict[str, Tensor]:
        return {
            "P": torch.randn(shapes["P"]) * 0.02,
            "E": torch.zeros(shapes["E"]),
            "Q": torch.randn(shapes["Q"]) * 0.02,
        }

    def factors(self, t: Tensors) -> Factors:
        return Factors(t["P"], t["Q"], Diagonal(t["E"]), self.alpha / self.first_rank)

    def start_schedule(self, updates: Sequence[Update]) -> None:
        BudgetSchedule(updates)

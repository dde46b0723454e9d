"""AdaLoRA's scores, budget and orthogonality, run by the optimizer's own steps."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectune.layers.shards import as_part, whole

_FACTORS = ("P", "E", "Q")


class BudgetSchedule:
    """Score the triplets of many AdaLoRA updates at each optimizer step, and zero E outside the budget.

    With I = |w grad|: smoothed sensitivity Ib = b1 Ib + (1 - b1) I, uncertainty Ub = b2 Ub + (1 - b2) |I - Ib|, and a
    triplet scores Ib Ub of its E plus the means over its column of P and row of Q, all taken before the step, of the
    weights that the gradients belong to.  First of all the gradient of the orthogonality term, 4 gamma P (P^T P - I)
    and 4 gamma (Q Q^T - I) Q, is added to the gradients.

    It watches every optimizer and acts when one of its own parameters is stepped, so a plain loop, gradient
    accumulation, transformers.Trainer and accelerate all drive it with nothing to call.  Scores are buffers of the
    updates and travel in the model's state_dict.

    Args:
        updates: the modules that hold P, E and Q as parameters, and the method.
    """

    _alive: ClassVar[weakref.WeakSet[BudgetSchedule]] = weakref.WeakSet()
    _watching: ClassVar[bool] = False

    def __init__(self, updates: Sequence[Any]) -> None:
        for update in updates:
            update.register_buffer("step", torch.zeros((), dtype=torch.int64))
            update.register_buffer("kept", torch.ones_like(update.E, dtype=torch.bool))
            for name in _FACTORS:
                parameter = getattr(update, name)
                update.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter))
                update.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter))
            update.__dict__["schedule"] = self
        self.__setstate__({"updates": list(updates), "total_steps": None})

    def __getstate__(self) -> dict[str, Any]:
        return {"updates": self.updates(), "total_steps": self.total_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # reached by copies and pickles of a model as well: a copy has a schedule of its own, over its own updates
        self._updates = [weakref.ref(update) for update in state["updates"]]
        self._scored: list[Any] = []
        self.total_steps: int | None = state["total_steps"]
        self._warned = False
        BudgetSchedule._alive.add(self)
        if not BudgetSchedule._watching:
            register_optimizer_step_pre_hook(_before_step)
            register_optimizer_step_post_hook(_after_step)
            BudgetSchedule._watching = True
            _join_trainer()

    def updates(self) -> list[Any]:
        """Return the updates that are still part of a model."""
        return [update for ref in self._updates if (update := ref()) is not None]

    def _stepped_by(self, optimizer: Optimizer) -> bool:
        mine = {id(update.E) for update in self.updates()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the orthogonality term, and score."""
        self._scored = [update for update in self.updates() if update.E.grad is not None]
        for update in self._scored:
            settings = _settings(update)
            _add_orthogonality(update, settings.gamma)
            update.step += 1
            for name in _FACTORS:
                parameter = getattr(update, name)
                sensitivity = getattr(update, f"sensitivity_{name}")
                uncertainty = getattr(update, f"uncertainty_{name}")
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                now = (whole(parameter) * whole(grad)).abs_()
                sensitivity.lerp_(now, 1 - settings.beta1)
                uncertainty.lerp_((now - sensitivity).abs_(), 1 - settings.beta2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Allocate the budget by the scores."""
        if self._scored:
            self._allocate(self._scored)
        self._scored = []

    def _allocate(self, updates: list[Any]) -> None:
        method = _settings(updates[0])
        if method.total_steps is None:
            if self.total_steps is None:
                if not self._warned:
                    warnings.warn(
                        "AdaLoRA does not know the length of the run and keeps its initial rank: "
                        "give AdaLoRA(total_steps=...)",
                        stacklevel=2,
                    )
                    self._warned = True
                return
            method = dataclasses.replace(method, total_steps=self.total_steps)
        step = int(updates[0].step)
        total, first, last = (
            int(method.total_steps or 0),
            method.steps(method.t_init),
            method.steps(method.t_final),
        )
        ending = total - last
        if step <= first or (step < ending and step % method.interval):
            return
        if step <= ending:
            progress = (step - first) / (ending - first)
            budget = method.rank + (method.first_rank - method.rank) * (1 - progress) ** 3
            scores = [_triplet_scores(update) for update in updates]
            table = torch.stack([score.to(scores[0].device) for score in scores])
            keep = torch.zeros_like(table, dtype=torch.bool)
            keep.view(-1)[table.flatten().topk(round(budget * len(updates))).indices] = True
            for update, kept in zip(updates, keep, strict=True):
                update.kept.copy_(kept)
        for update in updates:
            update.E.mul_(as_part(update.kept, update.E))


def _settings(update: Any) -> Any:
    """Return the AdaLoRA of an update, looking inside a DoRA."""
    return getattr(update.method, "inner", update.method)


def _add_orthogonality(update: Any, gamma: float) -> None:
    for factor, rows in ((update.P, False), (update.Q, True)) if gamma else ():
        if factor.grad is not None:
            all_of_it = whole(factor)  # factors are thin
            gram = all_of_it @ all_of_it.mT if rows else all_of_it.mT @ all_of_it
            gram.diagonal().sub_(1)
            factor.grad.add_(as_part(gram @ all_of_it if rows else all_of_it @ gram, factor), alpha=4 * gamma)


def _triplet_scores(update: Any) -> Tensor:
    def score(name: str) -> Tensor:
        return getattr(update, f"sensitivity_{name}") * getattr(update, f"uncertainty_{name}")

    return score("E") + score("P").mean(0) + score("Q").mean(1)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for schedule in list(BudgetSchedule._alive):
        if schedule._stepped_by(optimizer):
            schedule.before_step()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for schedule in list(BudgetSchedule._alive):
        if schedule._stepped_by(optimizer):
            schedule.after_step()


def tell_total_steps(model: Any, steps: int) -> None:
    """Tell every AdaLoRA schedule in a model how many optimizer steps the run will take."""
    for module in model.modules():
        if (schedule := module.__dict__.get("schedule")) is not None:
            schedule.total_steps = steps


def _join_trainer() -> None:
    """Have every transformers.Trainer made from now on tell the length of its run.

    Its own list of callbacks is in a module that takes ten times as long to import, with all of `datasets`.
    """
    from transformers.trainer_callback import CallbackHandler, TrainerCallback

    class SpectuneRunLength(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            tell_total_steps(model, state.max_steps)

    begin = CallbackHandler.__init__

    def begin_with_ours(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.add_callback(SpectuneRunLength)

    CallbackHandler.__init__ = begin_with_ours

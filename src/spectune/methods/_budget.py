"""AdaLoRA's scores, budget and orthogonality, run by the optimizer's own steps."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_FACTORS = ("P", "E", "Q")


class BudgetSchedule:
    """Score the triplets of many AdaLoRA updates at each optimizer step, and zero E outside the budget.

    With I = |w grad|: smoothed sensitivity Ib = b1 Ib + (1 - b1) I, uncertainty Ub = b2 Ub + (1 - b2) |I - Ib|, and a
    triplet scores Ib Ub of its E plus the means over its column of P and row of Q.  Before each step the gradient of
    the orthogonality term, 4 gamma P (P^T P - I) and 4 gamma (Q Q^T - I) Q, is added to the gradients.

    It watches every optimizer and acts when one of its own parameters is stepped, so a plain loop, gradient
    accumulation, transformers.Trainer and accelerate all drive it with nothing to call.  Scores are buffers of the
    updates and travel in the model's state_dict.

    Args:
        updates: the modules that hold P, E and Q as parameters, and the method.
    """

    _alive: weakref.WeakSet[BudgetSchedule] = weakref.WeakSet()
    _watching = False

    def __init__(self, updates: Sequence[Any]) -> None:
        self._updates = [weakref.ref(update) for update in updates]
        self.total_steps: int | None = None
        self._warned = False
        for update in updates:
            update.register_buffer("step", torch.zeros((), dtype=torch.int64))
            update.register_buffer("kept", torch.ones_like(update.E, dtype=torch.bool))
            for name in _FACTORS:
                parameter = getattr(update, name)
                update.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter))
                update.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter))

    @classmethod
    def start(cls, updates: Sequence[Any]) -> None:
        """Attach a schedule to the updates; it lives as long as they do."""
        schedule = cls(updates)
        for update in updates:
            update.__dict__["schedule"] = schedule
        cls._alive.add(schedule)
        if not cls._watching:
            register_optimizer_step_pre_hook(_before_step)
            register_optimizer_step_post_hook(_after_step)
            cls._watching = True
            _join_trainer()

    def updates(self) -> list[Any]:
        """Return the updates that are still part of a model."""
        return [update for ref in self._updates if (update := ref()) is not None]

    def _stepped_by(self, optimizer: Optimizer) -> bool:
        mine = {id(update.E) for update in self.updates()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the orthogonality term."""
        for update in self.updates():
            gamma = _settings(update).gamma
            for grad, factor, rows in ((update.P.grad, update.P, False), (update.Q.grad, update.Q, True)):
                if grad is None or not gamma:
                    continue
                gram = factor @ factor.mT if rows else factor.mT @ factor
                gram.diagonal().sub_(1)
                grad.add_((gram @ factor if rows else factor @ gram), alpha=4 * gamma)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the scores from weights and gradients, then allocate the budget."""
        updates = [u for u in self.updates() if u.E.grad is not None]
        if not updates:
            return
        for update in updates:
            update.step += 1
            settings = _settings(update)
            for name in _FACTORS:
                parameter = getattr(update, name)
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sensitivity, uncertainty = (getattr(update, f"{kind}_{name}") for kind in ("sensitivity", "uncertainty"))
                now = (parameter * grad).abs_()
                sensitivity.lerp_(now, 1 - settings.beta1)
                uncertainty.lerp_((now - sensitivity).abs_(), 1 - settings.beta2)
        self._allocate(updates)

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
        total, first, last = int(method.total_steps or 0), method.steps(method.t_init), method.steps(method.t_final)
        ending = total - last
        if step <= first or (step < ending and step % method.interval):
            return
        if step <= ending:
            progress = (step - first) / (ending - first)
            budget = method.rank + (method.first_rank - method.rank) * (1 - progress) ** 3
            scores = torch.stack([_triplet_scores(update) for update in updates])
            keep = torch.zeros_like(scores, dtype=torch.bool)
            keep.view(-1)[scores.flatten().topk(round(budget * len(updates))).indices] = True
            for update, kept in zip(updates, keep, strict=True):
                update.kept.copy_(kept)
        for update in updates:
            update.E.mul_(update.kept)


def _settings(update: Any) -> Any:
    """Return the AdaLoRA of an update, looking inside a DoRA."""
    return getattr(update.method, "inner", update.method)


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
    """Have every transformers.Trainer made from now on tell the length of its run."""
    from transformers import trainer

    class SpectuneRunLength(trainer.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            tell_total_steps(model, state.max_steps)

    trainer.DEFAULT_CALLBACKS.append(SpectuneRunLength)

"""AdaLoRA's scores, budget and orthogonality, run by the optimizer's own steps."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectune.errors import SpectuneError
from spectune.layers.shards import as_part, is_part, whole
from spectune.layers.updates import Update
from spectune.private import after_backward
from spectune.shared import WhileNeeded, replaced

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler

_FACTORS = ("P", "E", "Q")
_MATRICES = ("P", "Q")
_SMALLEST = 1e-12  # a norm below it has no direction


class _Settings(Protocol):
    """AdaLoRA, as far as its schedule looks at it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]
    rank: int
    first_rank: int
    penalty: str
    gamma: float
    beta1: float
    beta2: float
    t_init: float
    t_final: float
    interval: int
    total_steps: int | None

    def steps(self, share: float) -> int: ...


if TYPE_CHECKING:

    class _Scored(Update):
        """An update under a schedule, which has put its count of steps and its choice of triplets beside E."""

        E: nn.Parameter
        step: Tensor
        kept: Tensor


class _State(TypedDict):
    updates: list[_Scored]
    total_steps: int | None


class BudgetSchedule:
    """Keep P and Q near orthonormal, score the triplets of many AdaLoRA updates, and zero E outside the budget.

    The order is that of the authors' code, where the penalty is part of the loss: its gradient joins that of P and Q in
    the backward pass, once for each optimizer step and before anything is clipped; the optimizer steps; then, with
    I = |w grad| of the weights after the step, the smoothed sensitivity Ib = b1 Ib + (1 - b1) I and the uncertainty
    Ub = b2 Ub + (1 - b2) |I - Ib| move, and a triplet scores Ib Ub of its E plus the means over its column of P and row
    of Q.  In the last phase scores stay as they are.

    The penalty is gamma times, for `mean_norm`, the mean over all P and Q of ||P^T P - I||_F and ||Q Q^T - I||_F, with
    the gradient 2 gamma P (P^T P - I) / (n ||P^T P - I||_F), and for `sum_of_squares` the sum of their squares, with
    4 gamma P (P^T P - I).

    It watches every optimizer and acts when one of its own parameters is stepped, so a plain loop, gradient
    accumulation, a GradScaler, transformers.Trainer and accelerate all drive it with nothing to call.  Scores are
    buffers of the updates and travel in the model's state_dict.

    Args:
        updates: the modules that hold P, E and Q as parameters, and the method.
    """

    _alive: ClassVar[weakref.WeakSet[BudgetSchedule]] = weakref.WeakSet()
    loss_scale: ClassVar[Tensor | None] = None  # of the backward pass at hand, where a GradScaler scaled its loss

    def __init__(self, updates: Sequence[Update]) -> None:
        scored = cast("list[_Scored]", list(updates))
        for update in scored:
            update.register_buffer("step", torch.zeros((), dtype=torch.int64, device=update.E.device))
            update.register_buffer("kept", torch.ones_like(update.E, dtype=torch.bool))
            for name in _FACTORS:
                parameter = getattr(update, name)
                update.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter))
                update.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter))
            update.__dict__["schedule"] = self
        self.__setstate__({"updates": scored, "total_steps": None})
        self.watch()

    def __getstate__(self) -> _State:
        return {"updates": self.updates(), "total_steps": self.total_steps}

    def __setstate__(self, state: _State) -> None:
        # reached by copies and pickles of a model as well: a copy has a schedule of its own, over its own updates,
        # which are not complete at this time
        self._updates = [weakref.ref(update) for update in state["updates"]]
        self._terms: dict[tuple[int, str], _Term] = {}
        self._scored: list[_Scored] = []
        self.total_steps: int | None = state["total_steps"]
        self._warned = False
        BudgetSchedule._alive.add(self)
        for effect in _effects():
            effect.acquire()
            # the effects of the process last as long as any schedule does, and a schedule as long as its model
            weakref.finalize(self, effect.release).atexit = False

    def updates(self) -> list[_Scored]:
        """Return the updates that are still part of a model."""
        return [update for ref in self._updates if (update := ref()) is not None]

    def _stepped_by(self, optimizer: Optimizer) -> bool:
        mine = {id(update.E) for update in self.updates()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def watch(self) -> None:
        """Have the term of each P and Q join their gradients in the backward pass.

        Not those that FSDP2 holds in parts: the parts come together outside of it only.  Nor views, which FSDP1 puts in
        the place of parameters while a state is loaded: `before_clip` finds what takes their place, or raises.
        """
        updates = self.updates()
        for i, update in enumerate(updates):
            for name in _MATRICES:
                parameter, term = getattr(update, name), self._terms.get((i, name))
                if parameter.is_leaf and (term is None or term.parameter() is not parameter):
                    self._terms[i, name] = _Term(parameter, name == "Q", _settings(update), 2 * len(updates))

    def before_clip(self) -> None:
        """Have what did not join a gradient in the backward pass join it now, with the gradients complete."""
        self.watch()
        if any(not getattr(update, name).is_leaf for update in self.updates() for name in _MATRICES):
            raise SpectuneError(
                "AdaLoRA's matrices are views of another parameter, as FSDP1 makes them, and have no gradients to "
                "score: train with FSDP2 (torch.distributed.fsdp.fully_shard), or with another method"
            )
        for term in self._terms.values():
            if not term.joined:
                term.join(1.0)

    def before_step(self) -> None:
        """Complete the gradients, and remember what has some."""
        self.before_clip()
        self._scored = [update for update in self.updates() if update.E.grad is not None]

    @torch.no_grad()
    def after_step(self) -> None:
        """Score, and allocate the budget by the scores."""
        for term in self._terms.values():
            term.joined = False
        for update in self._scored:
            update.step += 1
        if self._scored:
            method = self._method(self._scored[0])
            if method.total_steps is None or int(self._scored[0].step) <= method.total_steps - method.steps(
                method.t_final
            ):
                for update in self._scored:
                    _score(update, method)
            self._allocate(self._scored, method)
        self._scored = []

    def _method(self, update: _Scored) -> _Settings:
        """Return the AdaLoRA of an update, with the length of the run if it is known."""
        method = _settings(update)
        if method.total_steps is None and self.total_steps is not None:
            method = dataclasses.replace(method, total_steps=self.total_steps)
        return method

    def _allocate(self, updates: list[_Scored], method: _Settings) -> None:
        if method.total_steps is None:
            if not self._warned:
                warnings.warn(
                    "AdaLoRA does not know the length of the run and keeps its initial rank: "
                    "give AdaLoRA(total_steps=...)",
                    stacklevel=2,
                )
                self._warned = True
            return
        step = int(updates[0].step)
        total, first, last = (
            method.total_steps,
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
            keep.view(-1)[table.flatten().topk(int(budget * len(updates))).indices] = True
            for update, kept in zip(updates, keep, strict=True):
                update.kept.copy_(kept)
        for update in updates:
            update.E.mul_(as_part(update.kept, update.E))


def _settings(update: Update) -> _Settings:
    """Return the AdaLoRA of an update, looking inside a DoRA."""
    return cast("_Settings", getattr(update.method, "inner", update.method))


class _Term:
    """The penalty's part in the gradient of one matrix, which joins it once for each optimizer step.

    Args:
        parameter: P, or Q.
        rows: whether its rows are to be orthonormal, and not its columns.
        method: the AdaLoRA, with gamma and the kind of penalty.
        count: matrices over which the mean is taken.
    """

    def __init__(self, parameter: Tensor, rows: bool, method: _Settings, count: int) -> None:
        self.parameter = weakref.ref(parameter)
        self.rows, self.joined = rows, False
        self._mean = method.penalty == "mean_norm"
        self._factor = 2 * method.gamma / count if self._mean else 4 * method.gamma
        self._lacks: bool | Tensor = True
        if self._factor and parameter.requires_grad and not is_part(parameter):
            parameter.register_hook(self._before)
            parameter.register_post_accumulate_grad_hook(self._after)

    def _before(self, grad: Tensor) -> None:
        # the next batch of one optimizer step finds the term there, unless the gradient was set to zero in between
        there = self.joined and (parameter := self.parameter()) is not None and parameter.grad
        self._lacks = there.count_nonzero() == 0 if isinstance(there, Tensor) else True

    def _after(self, parameter: Tensor) -> None:
        scale = BudgetSchedule.loss_scale
        self.join(self._lacks if scale is None else scale.to(parameter.device) * self._lacks)

    @torch.no_grad()
    def join(self, times: float | Tensor) -> None:
        """Add the term to the matrix' gradient, if it has one."""
        parameter = self.parameter()
        if not self._factor or parameter is None or parameter.grad is None:
            return
        # the gradient of ||W^T W - I||_F by hand, with n x r products alone: autograd would keep a graph of it beside
        # the loss
        W = whole(parameter)  # thin
        gram = W @ W.mT if self.rows else W.mT @ W
        gram.diagonal().sub_(1)
        if self._mean:
            gram /= torch.linalg.vector_norm(gram).clamp_min(_SMALLEST)
        term = as_part((gram @ W if self.rows else W @ gram) * times, parameter)
        parameter.grad.add_(term.to(parameter.grad.dtype), alpha=self._factor)
        self.joined = True


def _score(update: _Scored, method: _Settings) -> None:
    for name in _FACTORS:
        parameter = getattr(update, name)
        sensitivity = getattr(update, f"sensitivity_{name}")
        uncertainty = getattr(update, f"uncertainty_{name}")
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        now = (whole(parameter) * whole(grad)).abs_()
        sensitivity.lerp_(now, 1 - method.beta1)
        uncertainty.lerp_((now - sensitivity).abs_(), 1 - method.beta2)


def _triplet_scores(update: _Scored) -> Tensor:
    def score(name: str) -> Tensor:
        return getattr(update, f"sensitivity_{name}") * getattr(update, f"uncertainty_{name}")

    return score("E") + score("P").mean(0) + score("Q").mean(1)


def _before_step(optimizer: Optimizer, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    for schedule in list(BudgetSchedule._alive):
        if schedule._stepped_by(optimizer):
            schedule.before_step()


def _after_step(optimizer: Optimizer, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    BudgetSchedule.loss_scale = None  # where the end of the backward pass was not told of
    for schedule in list(BudgetSchedule._alive):
        if schedule._stepped_by(optimizer):
            schedule.after_step()


def tell_total_steps(model: nn.Module, steps: int) -> None:
    """Tell every AdaLoRA schedule in a model how many optimizer steps the run will take."""
    for module in model.modules():
        if (schedule := module.__dict__.get("schedule")) is not None:
            schedule.total_steps = steps


def before_clip(model: nn.Module) -> None:
    """Have every AdaLoRA schedule in a model complete its gradients, which are about to be clipped."""
    schedules = {id(s): s for module in model.modules() if (s := module.__dict__.get("schedule")) is not None}
    for schedule in schedules.values():
        schedule.before_clip()


@functools.cache
def _effects() -> tuple[WhileNeeded, ...]:
    """Return what is process-wide while a schedule is alive: optimizers, GradScalers and Trainers are listened to."""
    from transformers.trainer_callback import CallbackHandler  # which takes its time to import

    return (
        WhileNeeded(lambda: register_optimizer_step_pre_hook(_before_step).remove),
        WhileNeeded(lambda: register_optimizer_step_post_hook(_after_step).remove),
        replaced(torch.amp.GradScaler, "scale", _telling_of_scale),
        replaced(CallbackHandler, "__init__", _telling_of_length),
    )


_Losses = Tensor | Iterable[Tensor]
_Scale = Callable[["GradScaler", _Losses], _Losses]
_Begin = Callable[..., None]


def _telling_of_scale(scale: _Scale) -> _Scale:
    """Have a GradScaler tell by what it scaled the loss of a backward pass, which AdaLoRA's penalty is part of."""

    @functools.wraps(scale)
    def scale_and_tell(self: GradScaler, outputs: _Losses) -> _Losses:
        scaled = scale(self, outputs)
        for loss in [scaled] if isinstance(scaled, Tensor) else scaled:
            if self.is_enabled() and isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(lambda grad: _during_this_pass(self._scale))
        return scaled

    return scale_and_tell


def _during_this_pass(scale: Tensor | None) -> None:
    BudgetSchedule.loss_scale = scale
    after_backward(lambda: setattr(BudgetSchedule, "loss_scale", None))


def _telling_of_length(begin: _Begin) -> _Begin:
    """Have a transformers.Trainer of a model with AdaLoRA on it tell the length of its run.

    Its own list of callbacks is in a module that takes ten times as long to import, with all of `datasets`.
    """
    from transformers.trainer_callback import TrainerCallback

    class SpectuneRunLength(TrainerCallback):
        def on_train_begin(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            model: nn.Module | None = None,
            **kwargs: object,
        ) -> None:
            assert model is not None  # the handler gives its own
            if getattr(args, "deepspeed", None):
                raise SpectuneError(
                    "AdaLoRA scores by whole tensors and their gradients after each step of the optimizer, which "
                    "DeepSpeed holds in parts of its own: take another method, or train without DeepSpeed"
                )
            tell_total_steps(model, state.max_steps)

    @functools.wraps(begin)
    def begin_with_ours(
        self: CallbackHandler,
        callbacks: list[type[TrainerCallback] | TrainerCallback],
        model: object,
        *args: object,
        **kwargs: object,
    ) -> None:
        begin(self, callbacks, model, *args, **kwargs)
        if isinstance(model, torch.nn.Module) and any("schedule" in module.__dict__ for module in model.modules()):
            self.add_callback(SpectuneRunLength)

    return begin_with_ours

"""A learning rate for a run: short runs at each of several rates from the same start, on its model and data.

Which rate is best goes with the curvature of the loss in what the adapter trains, which differs by method, model and
data (arXiv:2602.04998).  What is compared here is that curvature's effect itself: how far a short run gets, that rises
and falls as a whole one does.  Eight steps say nothing yet: all rates that hold have the same loss then, and the best
ones of a run a higher one (docs/study.md).  One run of a rate says less than its neighbour's differs by, so that the
best and those beside it have a second one, in another order of other batches.  Short runs favour higher rates than long
ones (arXiv:1803.02021), and one that is too high costs more than one that is too low, so that the rate taken is below
the best of them, and the further below, the longer the run is: by the square root of its steps.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from spectune.errors import SpectuneError
from spectune.model.lifecycle import detach
from spectune.progress import Bar
from spectune.speed.heap import memory_kept
from spectune.speed.parts import training_parts
from spectune.training import processes
from spectune.training.config import TrainConfig
from spectune.training.data.records import Record
from spectune.training.defaults import steps_of
from spectune.training.preparing import prepare, token_limit
from spectune.training.tasks import Task, make_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = 24  # at each rate
_RISE = 3  # of them, in which the rate rises
_PLACES = range(-4, 7)  # of rates, a factor of 10^(1/4) apart, around the method's own
_JUDGED = 6  # batches, of training records that the steps do not see
_AGAIN = 1  # places beside the best that have a second run: of one run the best is off by a place in a third of cases
_BELOW = 10**0.25  # times: by so much the best of short runs was above that of longer ones, in six grids of eight
_ALIKE = 32  # steps, those of the grids, up to which no more is taken off

Batch = dict[str, Any]  # as a task's collator makes it


class Tried(NamedTuple):
    """One rate, the mean loss after its runs, not finite where they diverged, and how many runs that were."""

    rate: float
    loss: float
    runs: int = 1


class Rate(NamedTuple):
    """What was found.

    Args:
        rate: to train at.
        reason: for it.
        before: the loss before any step.
        tried: each rate and its loss.
        steps: that were taken in all.
    """

    rate: float
    reason: str
    before: float
    tried: list[Tried]
    steps: int


def find_rate(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    console: Console | None = None,
) -> Rate:
    """Return a learning rate for a run on a loaded model, which is left as it was.

    Args:
        config: of the run.
        model: without adapters.
        tokenizer: its tokenizer.
        records: to learn from.
        console: shows how far it is.

    Raises:
        SpectuneError: a task without a loss to compare by, a run that goes on from an adapter or shards its base, or
            no rate that lowers the loss.
    """
    if config.task == "reinforce":
        raise SpectuneError("lr: auto compares losses, and task: reinforce has none before it samples: give a number")
    if config.fsdp or config.adapter is not None:
        raise SpectuneError("lr: auto tries a new adapter on a whole base: give a number with fsdp or adapter")
    task = make_task(config)
    batches = _batches(config, task, model, tokenizer, records)
    judged, learned = batches[:_JUDGED], batches[_JUDGED:] or batches
    bar = Bar(console or Console(quiet=True), "trying learning rates")
    with memory_kept.needed(), training_parts(model, task.dropout), bar:
        prepare(config, model)
        try:
            with warnings.catch_warnings():
                # a run this short prunes nothing, as the one whose rate is asked for does not in its first steps
                warnings.filterwarnings("ignore", "AdaLoRA does not know the length of the run")
                steps = steps_of(config, len(records), processes.count())
                return _search(config, task, model, judged, learned, steps, bar)
        finally:
            detach(model)
            model.eval()


def _batches(
    config: TrainConfig,
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
) -> list[Batch]:
    """Return batches drawn by the seed: those to judge by first, then those to learn from."""
    order = list(range(len(records)))
    random.Random(config.seed).shuffle(order)
    size = config.batch_size
    few = [records[i] for i in order[: 2 * size * (_JUDGED + 2 * STEPS)]]
    examples = task.encode(few, model, tokenizer, token_limit(config, model)).examples
    collate = task.collator(model, tokenizer)
    return [collate(examples[i : i + size]) for i in range(0, len(examples), size)][: _JUDGED + 2 * STEPS]


def _search(
    config: TrainConfig,
    task: Task,
    model: PreTrainedModel,
    judged: Sequence[Batch],
    learned: Sequence[Batch],
    steps: int,
    bar: Bar,
) -> Rate:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    own = config.parsed_method().learning_rate
    before, losses = _loss(task, model, judged), dict[int, list[float]]()
    orders = [learned, random.Random(config.seed + 1).sample(learned, len(learned))]

    def run(place: int) -> None:
        seen = losses.setdefault(place, [])
        set_seed(config.seed + len(seen))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        rate = own * 10 ** (place / 4)
        diverged = _after(config, task, model, trained, rate, orders[len(seen)])
        seen.append(_loss(task, model, judged) if diverged is None else diverged)
        bar(STEPS * sum(map(len, losses.values())), f"{rate:.2g}: loss {seen[-1]:.3f}")

    while (place := next_place([(at, each[0]) for at, each in losses.items()])) is not None:
        run(place)
    for place in run_again({at: each[0] for at, each in losses.items()}):
        run(place)
    tried = [Tried(own * 10 ** (at / 4), sum(each) / len(each), len(each)) for at, each in sorted(losses.items())]
    rate, reason = choose(before, tried, steps)
    return Rate(rate, reason, before, tried, STEPS * sum(each.runs for each in tried))


def run_again(losses: Mapping[int, float]) -> list[int]:
    """Return the places whose runs say least against each other: the best one's and those beside it.

    Args:
        losses: after one run, by place.
    """
    able = {place: loss for place, loss in losses.items() if math.isfinite(loss)}
    if not able:
        return []
    best = min(able, key=lambda place: (able[place], place))
    return [place for place in sorted(able) if abs(place - best) <= _AGAIN]


def next_place(tried: Sequence[tuple[int, float]]) -> int | None:
    """Return the place of the rate to try next: up by halves of a decade while it gets better, else down, then between.

    Args:
        tried: places and losses, in the order in which they were tried; a loss that is no number is worst.

    Returns:
        The place, quarters of a decade from the method's own rate; None where the best has its neighbours.
    """
    losses = {place: loss if math.isfinite(loss) else math.inf for place, loss in tried}
    if not losses:
        return 0
    best = min(losses, key=lambda place: (losses[place], place))
    steps = () if best % 2 else (2, -2, 1, -1)  # a place between two has both beside it
    return next((best + step for step in steps if best + step in _PLACES and best + step not in losses), None)


def _after(
    config: TrainConfig,
    task: Task,
    model: PreTrainedModel,
    trained: Mapping[str, Tensor],
    rate: float,
    learned: Sequence[Batch],
) -> float | None:
    """Take the steps at a rate; return infinity where the loss stops being a number."""
    others = {**task.group_rates(model), **config.group_lr}
    tails = {name: name.rpartition(".")[2] for name in trained}
    groups = [{"params": [p], "lr": others.get(tails[name], rate)} for name, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _RISE, (STEPS - step) / (STEPS - _RISE))
    )
    model.train()
    for step in range(STEPS):
        sums = task.sums(model, _placed(learned[step % len(learned)], model))
        loss = sums["loss"] / sums["items"]
        if not math.isfinite(float(loss.detach())):
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), config.max_grad_norm or math.inf)
        optimizer.step()
        schedule.step()
    return None


@torch.no_grad()
def _loss(task: Task, model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    model.eval()
    sums = [task.sums(model, _placed(batch, model)) for batch in batches]
    return sum(float(each["loss"]) for each in sums) / sum(float(each["items"]) for each in sums)


def _placed(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def choose(before: float, tried: Sequence[Tried], steps: int = _ALIKE) -> tuple[float, str]:
    """Return the rate to train at, given the losses after short runs at several, and why.

    It is a quarter of a decade below the one with the lowest mean loss of those with the most runs, and for a run of n
    steps, where these are more than 32, sqrt(32 / n) of that.

    Args:
        before: the loss before any step.
        tried: by rate.
        steps: of the run.

    Raises:
        SpectuneError: no rate lowers the loss.
    """
    able = [each for each in tried if math.isfinite(each.loss) and each.loss < before]
    most = max((each.runs for each in able), default=1)  # a mean of two is not to be had against a lucky one
    able = [each for each in able if each.runs == most]
    if not able:
        raise SpectuneError(
            f"no learning rate from {tried[0].rate:.2g} to {tried[-1].rate:.2g} lowers the loss ({before:.3f}) within "
            f"{STEPS} steps: look at the data with `spectune data`, or give lr"
        )
    best = min(able, key=lambda each: each.loss)
    reason = (
        f"of {len(tried)} rates from {tried[0].rate:.2g} to {tried[-1].rate:.2g}, {best.rate:.2g} took the loss of "
        f"unseen records lowest in {STEPS} steps ({before:.3f} -> {best.loss:.3f}); a run of {steps:,} wants less"
    )
    longer = max(1.0, steps / _ALIKE) ** 0.5
    return float(f"{best.rate / _BELOW / longer:.2g}"), reason


def measure(config: TrainConfig, console: Console | None = None) -> Rate:
    """Return a learning rate for a configuration, from its files alone.

    Raises:
        SpectuneError: as `train` and `find_rate`.
    """
    processes.start(config.device)
    task = make_task(config)
    records, held = task.read()
    model, tokenizer = task.load(records, held)
    task.measure(records, model, tokenizer)
    return find_rate(task.config, model, tokenizer, records, console)

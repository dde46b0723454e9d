"""The trainer: transformers.Trainer, with a task's loss and measures and checkpoints of the adapter alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from spectune.errors import SpectuneError, nearest
from spectune.layers.shards import whole
from spectune.methods._adalora_schedule import before_clip
from spectune.model.fusing import fused_where_it_pays
from spectune.speed.shapes import IGNORE
from spectune.training import processes
from spectune.training.draw import Drawn
from spectune.training.trainer.checkpoints import AdapterCheckpoints
from spectune.training.trainer.sampling import BLANK, BlankCollator, EvenSampler, Examples, Order, WithBlanks
from spectune.training.trainer.states import set_rates
from spectune.training.trainer.totals import Totals

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(Protocol):
    """A run's configuration, as far as the trainer looks at it."""

    @property
    def fused(self) -> bool: ...


class Objective(Protocol):
    """What the trainer asks of a task: the losses of a batch, and the measures of an evaluation."""

    curve: ClassVar[str]  # the measure that is shown and drawn
    shown: ClassVar[tuple[str, ...]]  # the measures of an evaluation that are shown and drawn beside the loss
    by_length: ClassVar[bool]  # batches are of examples of about one length
    gathered: ClassVar[tuple[str, ...]]  # of the sums, what is laid end to end over batches and not added

    @property
    def config(self) -> Settings:
        """The run's configuration."""
        ...

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over a batch: "loss", with its gradient, "items", and what `metrics` needs besides."""
        ...

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the measures of an evaluation, given sums over all its batches."""
        ...


Tensors = dict[str, Tensor]
_PASSES_A_BATCH = 8  # of few rows, that one of a held-out batch is worth


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """Train the adapter on a model by a task's loss; checkpoints hold it and not the base.

    Args:
        task: whose examples, batches, loss and measures these are.
        adapter_name: the adapter.
        group_lr: learning rates of trained tensors by their name in the method, such as "magnitude" or "z".
        args, kwargs: as for transformers.Trainer.
    """

    # `compute_loss` divides by the items of the whole step; without this the trainer would divide once more, by the
    # number of forward passes in it
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        task: Objective,
        adapter_name: str = "default",
        group_lr: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.task = task
        self.adapter_name = adapter_name
        self.group_lr = dict(group_lr or {})
        self.model_accepts_loss_kwargs = True  # so that the items of a step are counted
        self._tokens: Tensor | int = 0  # a tensor where the device counts them, which nobody waits for
        self._tr_loss: Tensor | float = 0.0
        self._order: EvenSampler | None = None
        self._schedule: LambdaLR | None = None  # one whose warm-up begins above zero already
        if self.args.world_size > 1:
            self.data_collator = BlankCollator(self.data_collator, cast(Examples, self.train_dataset)[0])

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """Return AdamW, with a group of its own for each tensor name that has its own learning rate.

        Raises:
            SpectuneError: no trained tensor has such a name.
        """
        if not self.group_lr or self.optimizer is not None:
            return super().create_optimizer(model)
        stepped = model if model is not None else self.model
        trained = {n: p for n, p in stepped.named_parameters() if p.requires_grad}
        tails = {n: n.rpartition(".")[2] for n in trained}
        for name in self.group_lr:
            if name not in tails.values():
                raise SpectuneError(f"group_lr: no trained tensor is named {name!r}{nearest(name, tails.values())}")
        groups: dict[str | None, list[Tensor]] = {}  # by name and not by rate, so that a resumed run may change rates
        for name, parameter in trained.items():
            groups.setdefault(tails[name] if tails[name] in self.group_lr else None, []).append(parameter)
        rates: dict[str | None, float] = {None: self.args.learning_rate, **self.group_lr}
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        options |= {"weight_decay": self.args.weight_decay}
        self.optimizer = kind([{"params": p, "lr": rates[name]} for name, p in groups.items()], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Return the schedule, with a warm-up that begins above zero: (s + 1) / (w + 1) in step s of w.

        transformers' own has a learning rate of zero in the first step, which then trains nothing.
        """
        schedule = super().create_scheduler(num_training_steps, optimizer)
        steps = self.args.get_warmup_steps(num_training_steps)
        if steps > 0 and isinstance(schedule, LambdaLR) and self._schedule is not schedule:
            self._schedule = schedule
            schedule.lr_lambdas = [rising(factor, steps) for factor in schedule.lr_lambdas]
            set_rates(schedule)
        return schedule

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the task's losses over the items of the batch, divided by those of the whole step.

        With several processes it is multiplied by their number, because gradients are averaged over them.
        """
        sums = self._sums(model, inputs)
        if num_items_in_batch is None:
            loss = sums["loss"] / sums["items"]
        else:
            loss = sums["loss"] * (self.args.world_size / num_items_in_batch)
        if model.training and not inputs.get(BLANK):
            self._tokens = self._tokens + (sums["tokens"] if "tokens" in sums else _token_count(inputs))
        return (loss, sums) if return_outputs else loss

    def _sums(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = dict(inputs)
        blank = inputs.pop(BLANK, False)
        sums = self.task.sums(model, inputs)
        if blank:
            return {key: value[:0] if key in self.task.gathered else value * 0 for key, value in sums.items()}
        return sums

    # private in transformers, and the only place where the batches of a whole step lie together: its own counts shifted
    # labels, which packed examples are not, and blanks among them; without it the loss would be a mean of means
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Count the items of the loss in an optimizer step, over all processes."""
        counts = [(batch["labels"] != IGNORE).sum() for batch in batch_samples if not batch.get(BLANK)]
        return cast(Tensor, self.accelerator.reduce(torch.as_tensor(sum(counts), device=device)))

    def total_tokens(self) -> int:
        """Return the tokens that all processes have trained on; every process must ask for it."""
        return round(processes.total(float(self._tokens))[0])

    # -- what must not go unseen: looked at where the loss is read anyway, so that no forward pass waits for it

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, unless the loss is not finite.

        Raises:
            SpectuneError: it is not; the last checkpoint is named and kept.
        """
        self._check("loss", logs.get("loss", 0.0))
        super().log(logs, *args, **kwargs)

    def check_loss(self) -> None:
        """Raise unless the loss of every step so far was finite.

        Raises:
            SpectuneError: it was not; the last checkpoint is named and kept.
        """
        self._check("loss", processes.total(float(self._tr_loss))[0])

    def _check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise SpectuneError(
                f"the {what} became {value} at step {self.state.global_step}: lower the learning rate ({self.kept()})"
            )

    # overridden because it is what comes before anything is written: a checkpoint without finite values would push a
    # good one out of the last few that are kept
    def _save_checkpoint(self, model: nn.Module, trial: dict[str, object] | None) -> None:
        self.check_loss()
        norms = [p.detach().float().norm() for p in self.model.parameters() if p.requires_grad]
        self._check(
            "adapter", float(whole(torch.stack(norms).sum()))
        )  # a gradient can be infinite where the loss is not
        super()._save_checkpoint(model, trial)

    # private: between the last gradient and the clipping there is no callback. Without it AdaLoRA's penalty would be
    # added to gradients that were clipped without it, and a sharded norm would be clipped by each process's own part
    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        before_clip(self.model)
        return whole(cast(Tensor, super()._clip_grad_norm(model)))

    def _prepare_for_training(self, *args: object, **kwargs: object) -> tuple[nn.Module, DataLoader[Tensors]]:
        with warnings.catch_warnings():  # the other name of this argument has other defaults
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return super()._prepare_for_training(*args, **kwargs)

    # -- the same batches and measures, whatever the number of processes

    # these three decide which examples a process sees. Without them accelerate repeats examples to fill up the last
    # batch of an epoch, so that what is trained and measured depends on the number of processes
    def _get_dataloader(self, dataset: Examples, *args: Any, **kwargs: Any) -> DataLoader[Tensors]:
        if self.args.world_size > 1:
            dataset = WithBlanks(dataset)
        return super()._get_dataloader(cast("Dataset[object]", dataset), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Examples | None = None) -> Sampler[int] | None:
        if isinstance(train_dataset, WithBlanks):
            train_dataset = train_dataset.examples
        sampler: Any
        if isinstance(self.train_dataset, Drawn):
            sampler = SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)
        else:
            sampler = super()._get_train_sampler(cast("Dataset[object] | None", train_dataset))
        if grouped := isinstance(sampler, LengthGroupedSampler):
            # by the examples of an optimizer step, which are those of all processes
            sampler.batch_size *= self.args.world_size
        if grouped or self.args.world_size > 1:  # accelerate sees to the order of the other one
            sampler = self._order = EvenSampler(
                sampler, self._even(self.args.per_device_train_batch_size), self.args.seed
            )
        return sampler

    # private, and the only step of resuming in which callbacks get back what they counted; without it patience starts
    # anew
    def _load_callback_state(self) -> None:
        """Go on counting evaluations without a better one; with transformers' own the patience would be the old one."""
        for callback in self._stoppers():
            saved = cast("dict[str, Any]", self.state.stateful_callbacks).get(
                type(callback).__name__, {"attributes": {}}
            )
            vars(callback).update(saved["attributes"])

    def _stoppers(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    # private, and entered once for each epoch, which no callback can skip
    def _run_epoch(self, *args: object, epoch: int, **kwargs: object) -> None:
        ended = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in self._stoppers())
        if ended or self.state.global_step >= self.state.max_steps:  # resumed there, where transformers would go on
            self.control.should_training_stop = True
            return
        if self._order is not None:  # accelerate does not find it behind the batches that a resumed run skips
            self._order.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Examples) -> EvenSampler:
        return EvenSampler(
            cast(Order, SequentialSampler(eval_dataset)), self._even(self.args.per_device_eval_batch_size)
        )

    def _even(self, batch: int) -> int:
        """Return the examples in a forward pass of all processes; what one process has need not be filled up."""
        processes = self.args.world_size
        return batch * processes if processes > 1 else 1

    def evaluation_loop(
        self, dataloader: DataLoader[Tensors], *args: object, metric_key_prefix: str = "eval", **kwargs: object
    ) -> EvalLoopOutput:
        """Add the task's sums up over all batches of all processes, and report its metrics of them.

        transformers' own loop weighs batches and not items, counts some examples twice on several processes, and marks
        a model so that a later `train` does not wrap it in DDP.

        Raises:
            SpectuneError: the loss is not finite.
        """
        self.model.eval()
        # its type says None, as it is before the first loop
        handler: Any = self.callback_handler
        handler.eval_dataloader = dataloader  # which is told to callbacks
        totals = Totals(self.task.gathered)
        passes = len(dataloader) * _PASSES_A_BATCH
        with fused_where_it_pays(self.model, passes, allowed=self.task.config.fused):
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    totals.add(self._sums(cast("PreTrainedModel", self.model), inputs))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        measures = self.task.metrics(totals.of_all(lambda value: cast(Tensor, self.accelerator.reduce(value))))
        self._check("held-out loss", measures.get("loss", 0.0))
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in measures.items()}
        none: Any = None  # no prediction is kept
        return EvalLoopOutput(none, none, metrics, len(cast(Examples, dataloader.dataset)))


def rising(factor: Callable[[int], float], steps: int) -> Callable[[int], float]:
    """Return a schedule's factor with other first steps, which rise from above zero."""
    return lambda step: (step + 1) / (steps + 1) if step < steps else factor(step)


def _token_count(inputs: Mapping[str, Tensor]) -> Tensor | int:
    for lengths in ("cu_seq_lens_k", "cu_seq_lens_q"):  # those of the examples, though computed once for several
        if lengths in inputs:
            return inputs[lengths][-1]
    mask = inputs.get("attention_mask")
    return mask.sum() if mask is not None else inputs["input_ids"].numel()

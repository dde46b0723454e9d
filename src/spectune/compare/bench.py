"""A model and its data, loaded once, on which trials run one after another."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from spectune.adapters.labels import ONE
from spectune.bases.classifiers import problem_of
from spectune.compare.answers import exact_matches, labels_chosen
from spectune.compare.candidates import BASE, FULL
from spectune.compare.config import LESS, CompareConfig
from spectune.compare.general import forgetting, general_texts, states_or_loss
from spectune.compare.looks import Looks, Report
from spectune.compare.meter import Peak, StepTimes, floor
from spectune.compare.parts import Fold, Parts
from spectune.compare.trial import Trial
from spectune.model.adapting import adapt
from spectune.model.fresh import FRESH
from spectune.model.lifecycle import detach, extract
from spectune.model.names import adapter_names
from spectune.model.routing import base_alone
from spectune.speed.checkpointing import checkpoint_activations, keep_activations
from spectune.speed.parts import training_parts
from spectune.training.arguments import training_arguments
from spectune.training.config import TrainConfig
from spectune.training.preparing import prepare
from spectune.training.progress import is_measure
from spectune.training.rate import find_rate
from spectune.training.tasks import Task, make_task
from spectune.training.tasks.preferences import Preferences
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

LOOKS = 4  # at the validation data, over a run
PLATEAU_LOOKS = 8  # where the loss is to say when a run ends
TIMED = 8  # steps of a run that measures their time
_FLOOR_BATCHES = 4
_EVAL_BATCHES = 4  # of training, in one of an evaluation


class Bench:
    """What all trials of a comparison share.

    Args:
        config: the comparison.

    Raises:
        SpectuneError: data that cannot be read, is too small for its parts or does not fit the metric, or a model that
            cannot be loaded.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.parts = Parts(config)
        config = self.config = self.parts.config
        task = make_task(config)
        self.model: PreTrainedModel
        self.model, self.tokenizer = self.parts.load(task)
        self.model.requires_grad_(False)
        # a layer that the task needs and the model does not have trains with every method
        self.has_new_head = any(getattr(module, FRESH, False) for module in self.model.modules())
        self.parts.encode(task, self.model, self.tokenizer)
        self._classifies = config.task == "classify" and problem_of(self.model) == ONE
        self.general = None if config.general is None else general_texts(config.general, self.model)
        self._before = None if self.general is None else states_or_loss(self.model, self.tokenizer, self.general)
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._bytes: dict[str, int] = {}
        self._base: dict[str, object] | None = None
        self.steps = config.max_steps or max(1, round(config.epochs * len(self.parts.fold(0).train) / per_step))

    def release(self) -> None:
        """Give the model's memory back, where others do the work."""
        self.model = cast(Any, None)

    def run(self, trial: Trial, report: Report = lambda looks: False) -> dict[str, object]:
        """Run a trial and return its result.

        Args:
            trial: what to run.
            report: told of every look at the validation data on the way; True stops the run there.

        Raises:
            SpectuneError: a loss that is not finite, or a layer that cannot take the method.
        """
        if trial.method == BASE and self._base is not None:
            return self._base
        if trial.kind == "start":
            return self._start(trial)
        fold = self.parts.fold(trial.seed)
        steps = min(self.steps, TIMED) if trial.kind == "time" else trial.steps or self.steps
        every = -(-steps // (PLATEAU_LOOKS if self.config.until == "plateau" else LOOKS))
        config = self.config.for_trial(trial.method, trial.lr, trial.seed, steps, every)
        start = time.perf_counter()
        with self._adapted(trial, config) as (model, setup, peak):
            trainer, result = self._trained(trial, config, model, fold, report)
            result |= {"setup_seconds": setup, "peak_bytes": peak.bytes()}
            if trial.kind == "final":
                result["floor_seconds"] = None if trial.method == FULL else self._floor(model, trainer)
                result |= self._judged(model, trainer, fold)
                result["adapter_bytes"] = self._stored(trial.method, model)
        result = {**result, "seconds": time.perf_counter() - start, "error": None}
        if trial.method == BASE and not self.has_new_head:  # nothing trains, so that no seed makes a difference
            self._base = result
        return result

    def _start(self, trial: Trial) -> dict[str, object]:
        """Measure at which rate a method's search begins."""
        start = time.perf_counter()
        config = self.config.for_trial(trial.method, None, trial.seed, self.steps, self.steps)
        try:
            found = find_rate(config, self.model, self.tokenizer, self.parts.records["train"])
        finally:
            self.model.requires_grad_(False)
        seconds = time.perf_counter() - start
        about = {"start": found.rate, "reason": found.reason, "steps": found.steps, "seconds": seconds}
        return {**about, "pruned": False, "history": [], "error": None}

    @contextmanager
    def _adapted(self, trial: Trial, config: TrainConfig) -> Iterator[tuple[PreTrainedModel, float, Peak]]:
        """Give the model as the method has it at its start, the seconds that took, and a meter of memory."""
        set_seed(trial.seed)
        model, peak = self.model, Peak()
        start = time.perf_counter()
        try:
            if trial.method == FULL:
                model = copy.deepcopy(self.model).float()
            if trial.method in (BASE, FULL):
                if self.has_new_head:
                    adapt(model, "lora", exclude=".*")  # the new head alone
                if trial.method == FULL:
                    model.requires_grad_(True)
                checkpoint_activations(model, config.gradient_checkpointing)
                model.train()
            else:
                prepare(config, model)
            yield model, time.perf_counter() - start, peak
        finally:
            detach(model)
            keep_activations(self.model)
            self.model.requires_grad_(False)

    def _arguments(self, trial: Trial, config: TrainConfig, task: Task) -> TrainingArguments:
        arguments = training_arguments(config, self.model, trial.kind != "time", task)
        arguments.save_strategy = SaveStrategy.NO
        arguments.load_best_model_at_end = False
        if self.config.task == "classify":  # whose logits are few, so that a pass without gradients takes little
            arguments.per_device_eval_batch_size = _EVAL_BATCHES * config.batch_size
        arguments.bf16 = trial.method == FULL and self.model.dtype == torch.bfloat16
        return arguments

    def _looks(self, chosen: list[int], fold: Fold, report: Report) -> Looks:
        key = self.config.searched_by
        return Looks(
            key=key,
            sign=-1 if key in LESS else 1,
            right=lambda: _right(chosen, fold.validation) if self._classifies and key == "accuracy" else None,
            report=report,
            window=PLATEAU_LOOKS // LOOKS if self.config.until == "plateau" else None,
        )

    def _trained(
        self, trial: Trial, config: TrainConfig, model: PreTrainedModel, fold: Fold, report: Report
    ) -> tuple[AdapterTrainer, dict[str, object]]:
        task = make_task(config)
        if isinstance(task, Preferences) and trial.method == FULL:  # whose own weights move away from the base's
            task.reference = self.model
        times, chosen = StepTimes(), list[int]()  # labels, in the order of the examples
        looks = self._looks(chosen, fold, report)
        with (
            training_parts(self.model),
            training_parts(model, task.dropout),
            labels_chosen(model, chosen) if self._classifies else nullcontext(),
        ):
            trainer = task.trainer(
                model=model,
                args=self._arguments(trial, config, task),
                train_dataset=fold.train,
                eval_dataset=fold.validation,
                data_collator=task.collator(model, self.tokenizer),
                callbacks=[times, looks],
            )
            trainer.remove_callback(PrinterCallback)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if trial.kind != "time":
                trainer.evaluate()
            set_seed(trial.seed)
            start = time.perf_counter()
            if trained:
                trainer.train()
                trainer.check_loss()
            seconds = time.perf_counter() - start
            if trained and trial.kind != "time" and looks.looks[-1].step < trainer.state.global_step:
                trainer.evaluate()
        history = [*(line for line in trainer.state.log_history if "loss" in line), *looks.history]
        kept = [{k: float(v) for k, v in line.items() if k == "step" or is_measure(k)} for line in history]
        return trainer, {
            "steps": trainer.state.global_step,
            "whole": self.steps,
            "records": len(self.parts.test),
            "trainable_parameters": trained,
            "train_seconds": seconds,
            "step_seconds": times.median(),
            "floor_seconds": None,
            "tokens_per_second": trainer.total_tokens() / seconds if trained else None,
            "history": sorted(kept, key=lambda line: line["step"]),
            "looks": [look._asdict() | {"right": _text(look.right)} for look in looks.looks],
            "validation": _measures(looks.history[-1], "eval") if looks.history else None,
            "pruned": looks.dropped,
            "test": None,
            "train": None,
            "right": None,
            "general": None,
            "adapter_bytes": None,
        }

    def _floor(self, model: PreTrainedModel, trainer: AdapterTrainer) -> float:
        """Return the seconds of the base's passes, once the peak of training is known: they keep every activation."""
        batches = itertools.islice(iter(trainer.get_train_dataloader()), _FLOOR_BATCHES)
        keep_activations(model)
        with training_parts(model), base_alone(model):
            return floor(model, trainer.task, batches)

    def _judged(self, model: PreTrainedModel, trainer: Any, fold: Fold) -> dict[str, object]:
        """Measure what has been learned on the test, on as much of the training data, and on general text."""
        model.eval()
        found: dict[str, Any] = {}
        chosen: list[int] = []  # labels, in the order of the examples
        with training_parts(self.model), training_parts(model):
            with labels_chosen(model, chosen) if self._classifies else nullcontext():
                found["test"] = _measures(trainer.evaluate(self.parts.tested, metric_key_prefix="test"), "test")
                right = _right(chosen, self.parts.tested) if self._classifies else None
            found["right"] = right
            found["train"] = _measures(trainer.evaluate(fold.sample, metric_key_prefix="train"), "train")
        if self.config.measure == "exact_match":
            for name, records in (("train", fold.asked), ("test", self.parts.test)):
                found["right"] = exact_matches(model, self.tokenizer, records, fused=self.config.fused)
                found[name]["exact_match"] = sum(found["right"]) / len(records)
        if self.general is not None and self._before is not None:
            after = states_or_loss(model, self.tokenizer, self.general)
            found["general"] = forgetting(self._before, after, self.general)
        return found

    def _stored(self, method: str, model: nn.Module) -> int:
        """Return the bytes of what is saved: the adapter, or for full fine-tuning the weights in the base's dtype."""
        if method not in self._bytes:
            size = sum(p.numel() * p.element_size() for p in self.model.parameters()) if method == FULL else 0
            if method != FULL and adapter_names(model):
                with tempfile.TemporaryDirectory() as folder:
                    extract(model).save(folder)
                    size = sum(path.stat().st_size for path in Path(folder).iterdir())
            self._bytes[method] = size
        return self._bytes[method]


def _right(chosen: list[int], examples: Sequence[Any]) -> list[int]:
    """Return for each example whether the label chosen last is its own, and forget what was chosen."""
    right = [int(a == e["labels"]) for a, e in zip(chosen[-len(examples) :], examples, strict=True)]
    chosen.clear()
    return right


def _text(right: Sequence[int] | None) -> str | None:
    """Return answers as a file has them, in a tenth of the space of a list."""
    return None if right is None else "".join(map(str, right))


def _measures(line: Mapping[str, float], prefix: str) -> dict[str, float]:
    own = {k.removeprefix(f"{prefix}_"): v for k, v in line.items() if k.startswith(f"{prefix}_")}
    return {k: v for k, v in own.items() if is_measure(f"eval_{k}")}

"""A model and its data, loaded once, on which trials run one after another."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from spectune.adapters.labels import ONE
from spectune.bases.classifiers import problem_of
from spectune.bases.generation import generate
from spectune.bases.prompts import Message
from spectune.compare.candidates import BASE, FULL
from spectune.compare.config import CompareConfig
from spectune.compare.general import forgetting, general_texts, states_or_loss
from spectune.compare.meter import Peak, StepTimes, floor
from spectune.compare.trial import Trial
from spectune.errors import SpectuneError
from spectune.model.adapting import adapt
from spectune.model.fresh import FRESH
from spectune.model.fusing import fused_where_it_pays
from spectune.model.lifecycle import detach, extract
from spectune.model.names import adapter_names
from spectune.model.routing import base_alone
from spectune.speed.checkpointing import checkpoint_activations, keep_activations
from spectune.speed.parts import training_parts
from spectune.training.config import TrainConfig
from spectune.training.data.records import Record, copies, form
from spectune.training.preparing import prepare, token_limit
from spectune.training.progress import is_measure
from spectune.training.run import training_arguments
from spectune.training.tasks import Task, make_task
from spectune.training.tasks.preferences import Preferences
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

LEAST = 8  # records that validation and test need each
RUNGS = (1, 2, 4)  # quarters of a run at which it is measured
_FLOOR_BATCHES = 4
_SAMPLE = 128  # training records at most that the gap to the test is measured with
_ANSWERS = 32  # prompts answered at once

Report = Callable[[int, Mapping[str, float]], bool]  # the rung and its measures -> whether to stop


class Bench:
    """What all trials of a comparison share.

    Args:
        config: the comparison.

    Raises:
        SpectuneError: data that cannot be read, is too small for its parts or does not fit the metric, or a model that
            cannot be loaded.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        task = make_task(config)
        assert config.data is not None  # or the configuration was not checked
        self.notes: list[str] = []  # what is to be known of the way that the data was read
        records = task.records(config.data, config.data_config, config.data_split)
        test = [] if config.test_data is None else task.records(config.test_data)
        task.look(records, test)
        self.notes += task.notes
        config = self.config = _looked_at(config, cast(CompareConfig, task.config))
        if config.test_data is None:
            records, test = _parts(task, records, config.test, "test")
        else:
            _tell_leaks(records, test, self.notes.append)
        records, validation = _parts(task, records, config.validation, "validation")
        self.records = {"train": records, "validation": validation, "test": test}
        for name, part in self.records.items():
            if len(part) < LEAST:
                raise SpectuneError(
                    f"{name} has {len(part)} records, and says nothing below {LEAST}: give more data or a larger share"
                )
        if config.measure == "exact_match":
            for record in [*records, *validation, *test]:
                _question(record)
        self.model: PreTrainedModel
        self.model, self.tokenizer = task.load(records, [*validation, *test])
        self.model.requires_grad_(False)
        # a layer that the task needs and the model does not have trains with every method
        self.has_new_head = any(getattr(module, FRESH, False) for module in self.model.modules())
        limit = token_limit(config, self.model)
        encoded = {k: task.encode(part, self.model, self.tokenizer, limit) for k, part in self.records.items()}
        self.examples = {name: part.examples for name, part in encoded.items()}
        self.cut = {name: part.cut for name, part in encoded.items()}
        self.dropped = {name: part.dropped for name, part in encoded.items()}
        learned = self.examples["train"]
        count = min(_SAMPLE, len(test), len(learned))
        self.examples["sample"] = learned[:: len(learned) // count][:count]
        self.general = None if config.general is None else general_texts(config.general, self.model)
        self._before = None if self.general is None else states_or_loss(self.model, self.tokenizer, self.general)
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._bytes: dict[str, int] = {}
        self._base: dict[str, Any] | None = None
        self.steps = config.max_steps or max(1, round(config.epochs * len(self.examples["train"]) / per_step))

    def release(self) -> None:
        """Give the model's memory back, where others do the work."""
        self.model = cast(Any, None)

    def run(self, trial: Trial, report: Report = lambda rung, measures: False) -> dict[str, Any]:
        """Run a trial and return its result.

        Args:
            trial: what to run.
            report: told of every rung; True stops the run there.

        Raises:
            SpectuneError: a loss that is not finite, or a layer that cannot take the method.
        """
        if trial.method == BASE and self._base is not None:
            return self._base
        quarter = max(1, self.steps // RUNGS[-1])
        config = self.config.for_trial(trial.method, trial.lr, trial.seed, self.steps, quarter)
        start = time.perf_counter()
        with self._adapted(trial, config) as (model, setup, peak):
            result = self._trained(trial, config, model, quarter, report)
            result |= {"setup_seconds": setup, "peak_bytes": peak.bytes()}
            trainer = result.pop("trainer")
            if trial.kind == "final":
                result["floor_seconds"] = None if trial.method == FULL else self._floor(model, trainer)
                result |= self._judged(model, trainer)
                result["adapter_bytes"] = self._stored(trial.method, model)
        result = {**result, "seconds": time.perf_counter() - start, "error": None}
        if trial.method == BASE and not self.has_new_head:  # nothing trains, so that no seed makes a difference
            self._base = result
        return result

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

    def _trained(
        self, trial: Trial, config: TrainConfig, model: PreTrainedModel, quarter: int, report: Report
    ) -> dict[str, Any]:
        task = make_task(config)
        if isinstance(task, Preferences) and trial.method == FULL:  # whose own weights move away from the base's
            task.reference = self.model
        arguments = training_arguments(config, self.model, True, task)
        arguments.save_strategy = SaveStrategy.NO
        arguments.load_best_model_at_end = False
        arguments.bf16 = trial.method == FULL and self.model.dtype == torch.bfloat16
        times = StepTimes()
        rungs = _Rungs(quarter, report)
        with training_parts(self.model), training_parts(model, task.dropout):
            trainer = task.trainer(
                model=model,
                args=arguments,
                train_dataset=self.examples["train"],
                eval_dataset=self.examples["validation"],
                data_collator=task.collator(model, self.tokenizer),
                callbacks=[times, rungs],
            )
            trainer.remove_callback(PrinterCallback)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            start = time.perf_counter()
            if trained:
                trainer.train()
                trainer.check_loss()
            seconds = time.perf_counter() - start
            if not trained:
                rungs.history.append({"step": 0, **trainer.evaluate()})
        history = [*(line for line in trainer.state.log_history if "loss" in line), *rungs.history]
        kept = [{k: float(v) for k, v in line.items() if k == "step" or is_measure(k)} for line in history]
        last = max((line for line in kept if "eval_loss" in line), key=lambda line: line["step"])
        return {
            "steps": trainer.state.global_step,
            "trainable_parameters": trained,
            "train_seconds": seconds,
            "step_seconds": times.median(),
            "floor_seconds": None,
            "tokens_per_second": trainer.total_tokens() / seconds if trained else None,
            "history": sorted(kept, key=lambda line: line["step"]),
            "validation": _measures(last, "eval"),
            "pruned": rungs.stopped,
            "test": None,
            "train": None,
            "right": None,
            "general": None,
            "adapter_bytes": None,
            "trainer": trainer,
        }

    def _floor(self, model: PreTrainedModel, trainer: AdapterTrainer) -> float:
        """Return the seconds of the base's passes, once the peak of training is known: they keep every activation."""
        batches = itertools.islice(iter(trainer.get_train_dataloader()), _FLOOR_BATCHES)
        keep_activations(model)
        with training_parts(model), base_alone(model):
            return floor(model, trainer.task, batches)

    def _judged(self, model: PreTrainedModel, trainer: Any) -> dict[str, Any]:
        """Measure what has been learned on the test, on as much of the training data, and on general text."""
        model.eval()
        found: dict[str, Any] = {}
        chosen: list[int] = []  # labels, in the order of the examples
        classifies = self.config.task == "classify" and problem_of(self.model) == ONE
        with training_parts(self.model), training_parts(model):
            with _labels(model, chosen) if classifies else nullcontext():
                found["test"] = _measures(trainer.evaluate(self.examples["test"], metric_key_prefix="test"), "test")
            found["train"] = _measures(trainer.evaluate(self.examples["sample"], metric_key_prefix="train"), "train")
        if self.config.measure == "exact_match":
            for name in ("train", "test"):
                records = self.records[name][: None if name == "test" else len(self.examples["sample"])]
                found["right"] = exact_matches(model, self.tokenizer, records, fused=self.config.fused)
                found[name]["exact_match"] = sum(found["right"]) / len(records)
        elif classifies:
            found["right"] = [int(a == e["labels"]) for a, e in zip(chosen, self.examples["test"], strict=True)]
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


@contextmanager
def _labels(model: nn.Module, chosen: list[int]) -> Iterator[None]:
    """Within the context, add the labels that a classifier chooses to a list."""
    watch = model.register_forward_hook(lambda module, inputs, out: chosen.extend(out.logits.argmax(-1).tolist()))
    try:
        yield
    finally:
        watch.remove()


class _Rungs(TrainerCallback):
    """Tell of the measures at the rungs, and stop where the answer says so."""

    def __init__(self, quarter: int, report: Report) -> None:
        self._quarter, self._report = quarter, report
        self.stopped = False
        self.history: list[dict[str, float]] = []

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if metrics is None or not all(key.startswith("eval_") for key in metrics if key != "epoch"):
            return
        self.history.append({"step": state.global_step, **metrics})
        rung = round(state.global_step / self._quarter)
        last = state.global_step >= state.max_steps
        if not last and rung in RUNGS[:-1] and self._report(rung, _measures(metrics, "eval")):
            self.stopped = control.should_training_stop = True


def exact_matches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, fused: bool = True
) -> list[int]:
    """Return for each record whether the model's greedy reply is its completion, but for space around it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        records: with messages, or prompt and completion; the last completion is what is asked for.
        fused: answer from merged weights beside the base's, where that is faster.
    """
    asked = [_question(record) for record in records]
    longest = max(len(tokenizer(answer)["input_ids"]) for _, answer, _ in asked)
    right = [0] * len(asked)
    passes = (longest + 4) * -(-len(asked) // _ANSWERS)
    with fused_where_it_pays(model, passes, allowed=fused):
        for raw in (False, True):
            places = [i for i, question in enumerate(asked) if question[2] == raw]
            for start in range(0, len(places), _ANSWERS):
                part = places[start : start + _ANSWERS]
                questions = [asked[i][0] for i in part]
                settings = {"max_new_tokens": longest + 4, "raw": raw, "fused": fused}
                replies = generate(model, tokenizer, questions, **settings)
                for i, reply in zip(part, replies, strict=True):
                    right[i] = int(reply.text.strip() == asked[i][1].strip())
    return right


def _question(record: Record) -> tuple[str | Sequence[Message], str, bool]:
    kind = form(record)
    if kind == "messages":
        *before, last = record["messages"]
        return before, last["content"], False
    if kind == "completion" and isinstance(record["prompt"], list):
        return record["prompt"], record["completion"][-1]["content"], False
    if kind == "completion":
        return record["prompt"], record["completion"], True
    raise SpectuneError("metric: exact_match needs records with messages, or with prompt and completion")


def _parts(task: Task, records: Sequence[Record], share: float, name: str) -> tuple[Sequence[Record], Sequence[Record]]:
    """Split records as a run does: those that are the same stay together, and labels are in both parts alike."""
    try:
        return task.split(records, share)
    except SpectuneError:
        raise SpectuneError(
            f"{len(records)} records are too few for {name}={share}: give more data or another share"
        ) from None


def _looked_at(given: CompareConfig, found: CompareConfig) -> CompareConfig:
    """Return the configuration with what the data says of it, as what kind of labels it has.

    Raises:
        SpectuneError: the metric is of another kind.
    """
    if given.measure in found.of_task().measured():
        return found
    kind = getattr(found, "problem_type", None)
    raise SpectuneError(
        f"the labels are for problem_type={kind}, which has no {given.measure}: give problem_type={kind}"
    )


def _tell_leaks(records: Sequence[Record], test: Sequence[Record], say: Callable[[str], None]) -> None:
    _, leaks = copies(records, test)
    if leaks:
        say(f"{leaks} of {len(test)} test records are in the training data too: measures will flatter")


def _measures(line: Mapping[str, float], prefix: str) -> dict[str, float]:
    own = {k.removeprefix(f"{prefix}_"): v for k, v in line.items() if k.startswith(f"{prefix}_")}
    return {k: v for k, v in own.items() if is_measure(f"eval_{k}")}

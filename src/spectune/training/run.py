"""One run of `spectune train`: load, adapt, train, evaluate, save."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from spectune.adapters.adapter import Adapter
from spectune.adapters.destination import check_run_folder
from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.bases.quantizing import check_quantization
from spectune.errors import SpectuneError
from spectune.model.lifecycle import extract
from spectune.progress import Counted, working
from spectune.speed.heap import memory_kept, release_memory
from spectune.speed.parts import training_parts
from spectune.storage import telling_of_full_disks
from spectune.training import processes
from spectune.training.arguments import training_arguments
from spectune.training.config import TrainConfig
from spectune.training.curve import plot_curve
from spectune.training.data.encoding import Encoded
from spectune.training.data.records import Record
from spectune.training.defaults import sentence
from spectune.training.draw import encode_needed
from spectune.training.preparing import prepare, token_limit
from spectune.training.progress import Interrupted, RunLog, check_reports, is_measure
from spectune.training.rate import find_rate
from spectune.training.record import write_run
from spectune.training.registry import find_task
from spectune.training.replies import ReplyLog, asked
from spectune.training.resuming import (
    as_before,
    last_checkpoint,
    measured_before,
    report_changes,
    step_of,
    with_its_method,
)
from spectune.training.tasks import make_task
from spectune.training.trainer.checkpoint_files import checkpoints
from spectune.training.trainer.trainer import AdapterTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CURVE = "curve.png"
# oneDNN keeps a program of up to a megabyte for each shape of product, 1024 of them unless it is told otherwise before
# the first: more than a step uses, but each length of a packed row brings shapes of its own
_PROGRAMS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@dataclass
class Result:
    """What came of a run.

    Args:
        adapter: the trained adapter.
        before, after: the task's measures of what was held out ("loss" and others); empty where nothing was.
        steps: optimizer steps.
        seconds: of training alone.
        tokens_per_second: of training alone.
        setup_seconds: of decomposing and adapting.
        history: the logged lines.
    """

    adapter: Adapter
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds: float
    tokens_per_second: float
    setup_seconds: float
    history: list[dict[str, Any]] = field(repr=False)

    @property
    def loss_before(self) -> float | None:
        """Mean held-out loss before training, where something was held out."""
        return self.before.get("loss")

    @property
    def loss_after(self) -> float | None:
        """Mean held-out loss after training, where something was held out."""
        return self.after.get("loss")


def train(config: TrainConfig, console: Console | None = None) -> Result:
    """Run a configuration from its files to the saved adapter.

    Raises:
        SpectuneError: bad data, a wrong value, an output folder in use, or a loss that is not finite.
    """
    os.environ.setdefault(*_PROGRAMS)
    processes.start(config.device)
    output = Path(config.output)
    with processes.together():
        check_reports(config.reports())
        check_quantization(config.quantize)
        _check_output(config, output)
        console = (console or Console(stderr=True)) if processes.is_main() else Console(quiet=True)
        task = make_task(as_before(config, output) if config.resume else config)
        with working(console, "reading the data"):
            records, held = task.read()
        for note in task.notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        with working(console, f"loading {config.model}"):
            model, tokenizer = task.load(records, held)
        task.measure(records, model, tokenizer)
        config = task.config
        if config.lr == "auto":
            found = find_rate(config, model, tokenizer, records, console)
            console.print(f"lr {found.rate:.2g}: {found.reason}", highlight=False, markup=False, soft_wrap=True)
            config = config.model_copy(update={"lr": found.rate})
        if task.choices:
            apart = 0 if config.evaluation() is not None else len(held)
            said = sentence(config, task.choices, len(records) + apart, len(records), processes.count())
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    return train_model(config, model, tokenizer, records, held, console)


def _check_output(config: TrainConfig, output: Path) -> None:
    there = next(place for place in (output.absolute(), *output.absolute().parents) if place.exists())
    if processes.is_main() and not (there.is_dir() and os.access(there, os.W_OK)):
        why = "permissions forbid it" if there.is_dir() else "it is a file"
        raise SpectuneError(
            f"output: {output} cannot be written, for {there} is in the way ({why}): give another folder"
        )
    check_run_folder(output, [config.model], "run.json", ("config.yaml", "README.md", "log.jsonl", "curve.png"))
    if config.resume or config.overwrite:
        return
    if (output / CONFIG).exists():
        raise SpectuneError(f"{output} holds an adapter already: give another output, overwrite=true or resume=true")
    if checkpoints(output):
        raise SpectuneError(f"{output} holds an unfinished run: go on with resume=true, or give overwrite=true")


def train_model(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    held: Sequence[Record],
    console: Console | None = None,
) -> Result:
    """Adapt a loaded model and train it on records that are already split; the adapter "default" stays on it.

    Raises:
        SpectuneError: as `train`.
    """
    with memory_kept.needed(), training_parts(model, find_task(config.task).dropout):
        return _Run(config, model, tokenizer, records, held, console).result()


class _Run:
    """A run whose model and records are loaded.

    Args:
        config, model, tokenizer, records, held, console: as for `train_model`.

    Raises:
        SpectuneError: settings that do not go together, or nothing to go on from where it is asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        held: Sequence[Record],
        console: Console | None,
    ) -> None:
        processes.start(config.device)
        self.console = (console or Console(stderr=True)) if processes.is_main() else Console(quiet=True)
        self.output, self.model, self.tokenizer = Path(config.output), model, tokenizer
        self.records, self.held = records, held
        with processes.together():
            _check_sharding(config)
            check_reports(config.reports())
            self.start_from = Adapter.load(config.adapter) if config.adapter is not None else None
            if self.start_from is not None:
                config = with_its_method(config, self.start_from)
            self.checkpoint = last_checkpoint(self.output, self.console) if config.resume else None
            if self.checkpoint is not None:
                report_changes(config, self.output, (records, held), self.console)
        self.config, self.task = config, make_task(config)

    def result(self) -> Result:
        """Train and save, and return what came of it."""
        learned, evaluated = self._encoded()
        start = time.perf_counter()
        prepare(self.config, self.model, self.start_from)
        setup = time.perf_counter() - start
        log = self._begun()
        trainer = self._trainer(learned, evaluated, log)
        before = measured_before(log) if self.checkpoint is not None else {}
        if evaluated and not before:
            before = _evaluate(trainer)
        seconds = self._learn(trainer, log)
        speed = trainer.total_tokens() / seconds
        release_memory()  # what steps needed and nothing after them does
        after = _evaluate(trainer) if evaluated else {}
        adapter = self._saved(trainer, log)
        return Result(adapter, before, after, trainer.state.global_step, seconds, speed, setup, log.history)

    def _encoded(self) -> tuple[Encoded, Encoded | None]:
        """Return the examples to learn from, and those held out if any are; the console is told of them."""
        config, console, limit = self.config, self.console, token_limit(self.config, self.model)

        def encode(some: Sequence[Record], what: str = "to tokens") -> Encoded:
            return self.task.encode(Counted(some, console, what), self.model, self.tokenizer, limit)

        by_length, count = self.task.by_length, processes.count()
        learned = encode_needed(config, self.records, encode, by_length=by_length, processes=count)
        evaluated = encode(self.held, "held-out records to tokens") if self.held else None
        _report(console, learned, evaluated, limit)
        if config.eval_steps is not None and evaluated is None:
            console.print("eval_steps is given, but nothing is held out to evaluate on", style="yellow")
        return learned, evaluated

    def _begun(self) -> RunLog:
        """Make the folder one of this run, and return its log, which goes on where the checkpoint was written."""
        with processes.together(), telling_of_full_disks(self.output, "free some space and start again"):
            if processes.is_main():
                if self.checkpoint is None:
                    _clear(self.config, self.output)
                write_run(self.config, self.output, (self.records, self.held), self.task.files(self.model))
            return RunLog(self.output, self.console, None if self.checkpoint is None else step_of(self.checkpoint))

    def _trainer(self, learned: Encoded, evaluated: Encoded | None, log: RunLog) -> AdapterTrainer:
        config, model = self.config, self.model
        trainer = self.task.trainer(
            model=model,
            args=training_arguments(config, model, evaluated is not None, self.task),
            train_dataset=learned.examples,
            eval_dataset=evaluated.examples if evaluated else None,
            data_collator=self.task.collator(model, self.tokenizer),
            callbacks=[log, *([EarlyStoppingCallback(config.patience)] if config.patience else [])],
            group_lr=config.group_lr,
        )
        trainer.remove_callback(PrinterCallback)
        shows = processes.count() == 1 and not self.console.quiet
        shown = asked(self.held, getattr(config, "replies", 0)) if shows else []
        if shown:
            trainer.add_callback(ReplyLog(shown, self.tokenizer, self.console))
        log.watch(trainer)
        return trainer

    def _learn(self, trainer: AdapterTrainer, log: RunLog) -> float:
        """Take the steps, and return their seconds.

        Raises:
            SpectuneError: a loss that is not finite.
            Interrupted: somebody wanted it to end.
        """
        set_seed((self.config.seed + processes.rank()) % 2**32)  # what a process drops is its own affair
        start = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
            trainer.check_loss()
        finally:
            log.close()
        if log.interrupted:
            step, saved = trainer.state.global_step, trainer.last_checkpoint
            raise Interrupted(f"interrupted at step {step}; saved {saved}, go on with resume=true")
        return time.perf_counter() - start

    def _saved(self, trainer: AdapterTrainer, log: RunLog) -> Adapter:
        """Write the adapter and the curve into the folder, and return the adapter."""
        self.model.eval()
        adapter = extract(self.model)
        with processes.together():
            if processes.is_main():
                with telling_of_full_disks(self.output, trainer.with_more_space()):
                    adapter.save(self.output)
                    title, task = f"{self.config.model}, {self.config.method}", self.task
                    plot_curve(log.history, self.output / _CURVE, title, task.unit, task.shown, task.curve)
        return adapter


def _clear(config: TrainConfig, output: Path) -> None:
    """Take away what a run that this one replaces made of its own settings, but not the adapter to go on from."""
    goes_on = config.adapter is not None and Path(config.adapter).resolve() == output.resolve()
    for old in (*output.glob("*checkpoint-*"), output / "outcomes"):
        shutil.rmtree(old, ignore_errors=True)
    for name in ("labels.json", _CURVE, *(() if goes_on else (CONFIG, WEIGHTS))):
        (output / name).unlink(missing_ok=True)


def _check_sharding(config: TrainConfig) -> None:
    if config.fsdp and processes.count() == 1:
        raise SpectuneError(
            "fsdp=true shards over several processes, and this is one: torchrun --nproc-per-node 2 -m spectune"
        )
    if config.quantize is not None and processes.wants_shards(config.fsdp):
        raise SpectuneError("fsdp shards a base that is not packed: leave quantize out, or fsdp")


def _evaluate(trainer: AdapterTrainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {k.removeprefix("eval_"): v for k, v in found.items() if k.startswith("eval_") and is_measure(k)}


def _report(console: Console, learned: Encoded, evaluated: Encoded | None, limit: int) -> None:
    held = len(evaluated.examples) if evaluated else 0
    console.print(f"{len(learned.examples)} examples to learn from, {held} held out", highlight=False)
    for note in learned.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for what, encoded in (("training", learned), ("held-out", evaluated)):
        if encoded and encoded.cut:
            console.print(f"{encoded.cut} {what} examples were cut to {limit} tokens", style="yellow")
        if encoded and encoded.dropped:
            console.print(
                f"{encoded.dropped} {what} examples had nothing to learn from within {limit} tokens and were left out",
                style="yellow",
            )

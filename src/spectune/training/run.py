"""One run of `spectune train`: load, adapt, train, evaluate, save."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments, set_seed

from spectune.adapters.adapter import Adapter
from spectune.adapters.destination import check_run_folder
from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.bases.quantizing import check_quantization
from spectune.errors import SpectuneError
from spectune.methods import to_text
from spectune.model.lifecycle import extract
from spectune.progress import Counted, working
from spectune.speed.heap import memory_kept, release_memory
from spectune.speed.parts import training_parts
from spectune.storage import telling_of_full_disks
from spectune.training import processes
from spectune.training.config import FOLLOWING, TrainConfig
from spectune.training.curve import plot_curve
from spectune.training.data.encoding import Encoded
from spectune.training.data.records import Record
from spectune.training.defaults import sentence
from spectune.training.draw import encode_needed
from spectune.training.preparing import prepare, token_limit
from spectune.training.progress import Interrupted, RunLog, check_reports, is_measure
from spectune.training.rate import find_rate
from spectune.training.record import changed, digest, read_run, write_run
from spectune.training.registry import find_task
from spectune.training.replies import ReplyLog, asked
from spectune.training.tasks import Task, make_task
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
        task = make_task(_as_before(config, output) if config.resume else config)
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


def _as_before(config: TrainConfig, output: Path) -> TrainConfig:
    """Return a configuration whose settings that follow the data, and are not given, are those of the run to resume."""
    if not (output / "config.yaml").is_file():
        return config
    before = read_run(output)
    found = {key: before[key] for key in FOLLOWING if key in before and key not in config.model_fields_set}
    found |= {"lr": before["lr"]} if config.lr == "auto" else {}
    return config.model_copy(update=found)


def _check_output(config: TrainConfig, output: Path) -> None:
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
        return _train(config, model, tokenizer, records, held, console)


def _train(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    held: Sequence[Record],
    console: Console | None,
) -> Result:
    processes.start(config.device)
    console = (console or Console(stderr=True)) if processes.is_main() else Console(quiet=True)
    output = Path(config.output)
    with processes.together():
        _check_sharding(config)
        check_reports(config.reports())
        start_from = Adapter.load(config.adapter) if config.adapter is not None else None
        if start_from is not None:
            config = _with_its_method(config, start_from)
        checkpoint = _checkpoint(output, console) if config.resume else None
        if checkpoint is not None:
            _report_changes(config, output, (records, held), console)
    limit = token_limit(config, model)
    task = make_task(config)

    def encode(some: Sequence[Record], what: str = "to tokens") -> Encoded:
        return task.encode(Counted(some, console, what), model, tokenizer, limit)

    learned = encode_needed(config, records, encode, by_length=task.by_length, processes=processes.count())
    evaluated = encode(held, "held-out records to tokens") if held else None
    _report(console, learned, evaluated, limit)
    if config.eval_steps is not None and evaluated is None:
        console.print("eval_steps is given, but nothing is held out to evaluate on", style="yellow")
    start = time.perf_counter()
    prepare(config, model, start_from)
    setup = time.perf_counter() - start
    with processes.together(), telling_of_full_disks(output, "free some space and start again"):
        if processes.is_main():
            if checkpoint is None:
                _clear(config, output)
            write_run(config, output, (records, held), task.files(model))
        log = RunLog(output, console, None if checkpoint is None else _step(checkpoint))
    trainer = task.trainer(
        model=model,
        args=training_arguments(config, model, evaluated is not None, task),
        train_dataset=learned.examples,
        eval_dataset=evaluated.examples if evaluated else None,
        data_collator=task.collator(model, tokenizer),
        callbacks=[log, *([EarlyStoppingCallback(config.patience)] if config.patience else [])],
        group_lr=config.group_lr,
    )
    trainer.remove_callback(PrinterCallback)
    shown = asked(held, getattr(config, "replies", 0)) if processes.count() == 1 and not console.quiet else []
    if shown:
        trainer.add_callback(ReplyLog(shown, tokenizer, console))
    log.watch(trainer)
    before = _before(log) if checkpoint is not None else {}
    if evaluated and not before:
        before = _evaluate(trainer)
    set_seed((config.seed + processes.rank()) % 2**32)  # what a process drops is its own affair
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.check_loss()
    finally:
        log.close()
    if log.interrupted:
        raise Interrupted(
            f"interrupted at step {trainer.state.global_step}; saved {trainer.last_checkpoint}, go on with resume=true"
        )
    seconds = time.perf_counter() - start
    speed = trainer.total_tokens() / seconds
    release_memory()  # what steps needed and nothing after them does
    after = _evaluate(trainer) if evaluated else {}
    model.eval()
    adapter = extract(model)
    with processes.together():
        if processes.is_main():
            with telling_of_full_disks(output, f"{trainer.kept()}; free some space and go on with resume=true"):
                adapter.save(output)
                title = f"{config.model}, {config.method}"
                plot_curve(log.history, output / _CURVE, title, task.unit, task.shown, task.curve)
    return Result(adapter, before, after, trainer.state.global_step, seconds, speed, setup, log.history)


def _clear(config: TrainConfig, output: Path) -> None:
    """Take away what a run that this one replaces made of its own settings, but not the adapter to go on from."""
    goes_on = config.adapter is not None and Path(config.adapter).resolve() == output.resolve()
    for old in (*output.glob("*checkpoint-*"), output / "outcomes"):
        shutil.rmtree(old, ignore_errors=True)
    for name in ("labels.json", _CURVE, *(() if goes_on else (CONFIG, WEIGHTS))):
        (output / name).unlink(missing_ok=True)


def _with_its_method(config: TrainConfig, adapter: Adapter) -> TrainConfig:
    terms = (term for layer in adapter.layers.values() for term in layer.terms)
    methods = list(dict.fromkeys(term.method for term in terms if not term.method.replaces))  # not a classifier's head
    if "method" in config.model_fields_set and config.parsed_method() not in methods:
        raise SpectuneError(
            f"method {config.method} is given, and the adapter in {config.adapter} is {to_text(methods[0])}; leave "
            "method out to go on from it"
        )
    return config.model_copy(update={"method": to_text(methods[0])})


def _check_sharding(config: TrainConfig) -> None:
    if config.fsdp and processes.count() == 1:
        raise SpectuneError(
            "fsdp=true shards over several processes, and this is one: torchrun --nproc-per-node 2 -m spectune"
        )
    if config.quantize is not None and processes.wants_shards(config.fsdp):
        raise SpectuneError("fsdp shards a base that is not packed: leave quantize out, or fsdp")


def _before(log: RunLog) -> dict[str, float]:
    """Return what a resumed run measured before its first step."""
    first = log.history[0] if log.history and log.history[0]["step"] == 0 else {}
    return {k.removeprefix("eval_"): v for k, v in first.items() if k.startswith("eval_")}


def _evaluate(trainer: AdapterTrainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {k.removeprefix("eval_"): v for k, v in found.items() if k.startswith("eval_") and is_measure(k)}


def training_arguments(config: TrainConfig, model: PreTrainedModel, evaluates: bool, task: Task) -> TrainingArguments:
    """Return what transformers' Trainer is to do, given a run's configuration and whether anything is held out."""
    on_cpu = model.device.type == "cpu"
    skips = any(value and ("expert" in key or "layerdrop" in key) for key, value in model.config.to_dict().items())
    schedule = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[config.schedule]
    goes_back = config.best or config.patience is not None
    arguments = TrainingArguments(
        output_dir=config.output,
        learning_rate=config.learning_rate(),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or math.inf,  # with 0 nobody would look at the gradients
        eval_strategy="steps" if evaluates and config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_steps=(goes_back and config.eval_steps) or config.save_steps,  # or the best might not be there
        save_total_limit=2,
        load_best_model_at_end=goes_back,
        metric_for_best_model=task.best_metric,  # the greater the better, unless it ends in "loss"
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # which would wait for the device, and hide what the trainer looks for
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.reports() or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,  # bases are the same everywhere
        ddp_find_unused_parameters=skips,
        prediction_loss_only=True,
        train_sampling_strategy="group_by_length" if task.by_length else "random",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one device: DataParallel would cut up packed rows
    return arguments


def _checkpoint(output: Path, console: Console) -> Path:
    found = checkpoints(output, console)
    if not found:
        raise SpectuneError(f"there is no checkpoint in {output} to resume from; run without resume=true")
    for begun in output.glob(".checkpoint-*.partial") if processes.is_main() else ():
        shutil.rmtree(begun, ignore_errors=True)
    return found[-1]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _report_changes(config: TrainConfig, output: Path, parts: Sequence[Sequence[Record]], console: Console) -> None:
    """Refuse to resume a run whose meaning or data changed, and say what else did."""
    before = read_run(output)
    fatal, other = changed(before, config)
    if fatal:
        raise SpectuneError(
            f"cannot resume {output} with another {', '.join(fatal)}; give the values of {output / 'config.yaml'} "
            "(batch_size and accumulate may change where a step keeps its number of examples), or start anew with "
            "overwrite=true"
        )
    if before["digest"] != digest(chain.from_iterable(parts)):
        raise SpectuneError(
            f"cannot resume {output}: the data changed since its run began; give the data as it was, or start anew "
            "with overwrite=true or another output"
        )
    if other:
        console.print(f"resuming with changed {', '.join(other)}", style="yellow", highlight=False)
    if any("processes" in key for key in other):
        console.print("the result is the same up to rounding, and to what dropout draws", style="yellow")


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

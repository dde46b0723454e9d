"""What a run goes on from: the settings, the checkpoint and the measures of a run that was begun, or an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console

from spectune.adapters.adapter import Adapter
from spectune.errors import SpectuneError
from spectune.methods import to_text
from spectune.training import processes
from spectune.training.config import FOLLOWING, TrainConfig
from spectune.training.data.records import Record
from spectune.training.progress import RunLog
from spectune.training.record import changed, digest, read_run
from spectune.training.trainer.checkpoint_files import checkpoints


def as_before(config: TrainConfig, output: Path) -> TrainConfig:
    """Return a configuration whose settings that follow the data, and are not given, are those of the run to resume."""
    if not (output / "config.yaml").is_file():
        return config
    before = read_run(output)
    found = {key: before[key] for key in FOLLOWING if key in before and key not in config.model_fields_set}
    found |= {"lr": before["lr"]} if config.lr == "auto" else {}
    return config.model_copy(update=found)


def with_its_method(config: TrainConfig, adapter: Adapter) -> TrainConfig:
    """Return a configuration with the method of the adapter that the run goes on from.

    Raises:
        SpectuneError: another method is given, or the adapter has none.
    """
    terms = (term for layer in adapter.layers.values() for term in layer.terms)
    methods = list(dict.fromkeys(term.method for term in terms if not term.method.replaces))  # not a classifier's head
    if not methods:
        raise SpectuneError(
            f"the adapter in {config.adapter} has no layer with a method to go on with; leave adapter out to begin anew"
        )
    if "method" in config.model_fields_set and config.parsed_method() not in methods:
        raise SpectuneError(
            f"method {config.method} is given, and the adapter in {config.adapter} is {to_text(methods[0])}; leave "
            "method out to go on from it"
        )
    return config.model_copy(update={"method": to_text(methods[0])})


def last_checkpoint(output: Path, console: Console) -> Path:
    """Return the newest checkpoint that is whole, and remove what was begun behind it.

    Raises:
        SpectuneError: there is none.
    """
    found = checkpoints(output, console)
    if not found:
        raise SpectuneError(f"there is no checkpoint in {output} to resume from; run without resume=true")
    for begun in output.glob(".checkpoint-*.partial") if processes.is_main() else ():
        shutil.rmtree(begun, ignore_errors=True)
    return found[-1]


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def report_changes(config: TrainConfig, output: Path, parts: Sequence[Sequence[Record]], console: Console) -> None:
    """Say what changed since the run to resume began.

    Raises:
        SpectuneError: its meaning or its data did.
    """
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


def measured_before(log: RunLog) -> dict[str, float]:
    """Return what a resumed run measured before its first step."""
    first = log.history[0] if log.history and log.history[0]["step"] == 0 else {}
    return {k.removeprefix("eval_"): v for k, v in first.items() if k.startswith("eval_")}

"""spectune train"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from spectune.cli import completion
from spectune.cli.shared import JSON, let_the_main_process_speak, print_json, say_error, say_next
from spectune.errors import SpectuneError
from spectune.training.config import FOLLOWING, TrainConfig, load_config
from spectune.training.registry import task_keys

SETTINGS = {"ignore_unknown_options": True}
DATA = typer.Argument(
    metavar="DATA [KEY=VALUE]...",
    autocompletion=completion.settings,
    help="A file, pattern, folder or data set's id; and keys as for train.",
)
DATA_MODEL = typer.Option(
    ...,
    "--model",
    "-m",
    autocompletion=completion.models,
    help="Embedded name (smollm2-135m), local folder or hub id.",
)


def keys(fields: Mapping[str, FieldInfo], names: Iterable[str], follows: Collection[str] = ()) -> str:
    """Return a line for each of these keys of a configuration; those that follow the data say so."""
    lines = []
    for name in names:
        field = fields[name]
        default = "required" if field.is_required() else f"default {field.default}"
        default = "follows the data" if name in follows else default
        lines.append(f"* {name}: {field.description} ({default})")
    return "\n".join(lines)


HELP = f"""Fine-tune a model: spectune train run.yaml lr=1e-4 method=pissa:rank=16

Settings come from a YAML file, then from key=value or --key value, which win. The keys:

{keys(TrainConfig.model_fields, TrainConfig.model_fields, FOLLOWING)}
{keys(task_keys(), task_keys())}

The names that transformers, TRL, PEFT, axolotl and LLaMA-Factory have for these are taken too.
"""


def train(
    settings: list[str] = typer.Argument(
        None,
        metavar="[RUN.YAML] [KEY=VALUE]...",
        autocompletion=completion.settings,
        help="A file, and what wins over it.",
    ),
    json: bool = JSON,
) -> None:
    config = load_config(*file_and_pairs(settings or []))
    from spectune.training import processes
    from spectune.training.curve import spoken
    from spectune.training.progress import Interrupted
    from spectune.training.run import train as train_

    console = Console(stderr=True)
    try:
        result = train_(config, console)
    except Interrupted as interrupt:  # typer would end without a word
        let_the_main_process_speak(1)
        say_error(str(interrupt))
        say_next("spectune", "train", Path(config.output, "config.yaml"), "resume=true")
        raise typer.Exit(130) from None
    main = processes.is_main()
    processes.finish()
    if not main:
        return
    if json:
        print_json(
            {
                "output": config.output,
                "trained_parameters": result.adapter.parameter_count(),
                "steps": result.steps,
                "held_out_loss_before": result.loss_before,
                "held_out_loss_after": result.loss_after,
                "held_out_before": result.before,
                "held_out_after": result.after,
                "tokens_per_second": result.tokens_per_second,
                "seconds": result.seconds,
            }
        )
        return
    for name in (name for name in result.before if name in result.after):
        change = f"{result.before[name]:.3f} -> {result.after[name]:.3f}"
        console.print(f"held-out {spoken(name)} {change}", highlight=False)
    console.print(f"saved {result.adapter!r} in {config.output}", highlight=False)
    say_next("spectune", "eval", Path(config.output))


def file_and_pairs(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take apart the file, key=value, --key value and --key=value.

    Raises:
        SpectuneError: a flag without a value, or a second file.
    """
    file, pairs, rest = None, [], iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            if not equals and (value := next(rest, None)) is None:
                raise SpectuneError(f"{argument} needs a value")
            pairs.append(f"{key.replace('-', '_')}={value}")
        elif "=" in argument and not Path(argument).exists():
            pairs.append(argument)
        elif file is None:
            file = argument
        else:
            raise SpectuneError(f"two files are given, {file!r} and {argument!r}; give one, and key=value for the rest")
    return file, pairs


def data_and_pairs(arguments: list[str]) -> tuple[str, list[str]]:
    """Take apart the data and the keys, as `file_and_pairs` does.

    Raises:
        SpectuneError: no data is named, a flag is without a value, or a second file.
    """
    data, pairs = file_and_pairs(arguments)
    if data is None:
        raise SpectuneError("name the data: a file, a pattern, a folder or the id of a data set")
    return data, pairs

"""spectune compare"""

from __future__ import annotations

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from spectune.cli import completion
from spectune.cli.shared import JSON, print_json, say_command, say_error
from spectune.cli.train import file_and_pairs, keys
from spectune.compare.config import CompareConfig
from spectune.compare.report.model import Document
from spectune.training.config import TrainConfig, load_config

_OWN = [name for name in CompareConfig.model_fields if name not in TrainConfig.model_fields] + ["output"]
HELP = f"""Compare every method on one model and data set: spectune compare run.yaml seeds=3 lrs=5

A learning rate is searched for each method on validation data; each method then runs with several seeds and is judged
on test data, which chooses nothing.  The report is a page, a table and pictures in the output folder; a stopped run
goes on with the same command.  --preset quick compares on an embedded encoder within minutes.

Settings come from the preset, then a YAML file, then key=value or --key value, which win.  The keys of `spectune
train`, but for those that a comparison sets itself, and:

{keys(CompareConfig.model_fields, _OWN)}
"""


def compare(
    settings: list[str] = typer.Argument(
        None,
        metavar="[RUN.YAML] [KEY=VALUE]...",
        autocompletion=completion.settings,
        help="A file, and what wins over it.",
    ),
    preset: str | None = typer.Option(None, help="quick: what questions ask for, on MiniLM, within minutes."),
    json: bool = JSON,
) -> None:
    file, pairs = file_and_pairs(settings or [])
    from spectune.compare.presets import preset as preset_values

    config = load_config(file, pairs, CompareConfig, **({} if preset is None else preset_values(preset)))
    from spectune.compare.run import compare as compare_

    console = Console(stderr=True)
    columns = (TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    task = bar.add_task("compare", total=None)

    def tell(done: int, total: int, last: str) -> None:
        bar.update(task, completed=done, total=total)
        if last:
            bar.console.print(last, highlight=False, markup=False)

    try:
        with bar:
            document = compare_(config, tell)
    except KeyboardInterrupt:
        say_error("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    if json:
        print_json(document.model_dump())
        return
    _show(document, config)
    if document.train_command is not None:
        say_command(document.train_command)


def _show(document: Document, config: CompareConfig) -> None:
    console = Console()
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("parameters", config.measure.replace("_", " "), "95% interval", "lr"):
        table.add_column(heading, justify="right")
    for method in document.methods:
        value = method.metric
        if value is None:
            table.add_row(method.method, "", "failed", "", "")
            continue
        interval = "" if value.low is None else f"{value.low:.4f} to {value.high:.4f}"
        lr = "" if method.lr is None else f"{method.lr:g}"
        table.add_row(method.method, f"{method.trainable_parameters:,.0f}", f"{value.mean:.4f}", interval, lr)
    console.print(table)
    for sentence in document.answer:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"saved {config.output}/report.html", highlight=False, markup=False, soft_wrap=True)

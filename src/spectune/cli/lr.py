"""spectune lr"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from spectune.cli import completion
from spectune.cli.shared import JSON, print_json, say_next
from spectune.cli.train import file_and_pairs
from spectune.training.config import load_config


def lr(
    settings: list[str] = typer.Argument(
        None,
        metavar="[RUN.YAML] [KEY=VALUE]...",
        autocompletion=completion.settings,
        help="As for train: a file, and what wins over it.",
    ),
    json: bool = JSON,
) -> None:
    """Measure a learning rate for a run: a few steps at each of several, from the same start.

    spectune lr run.yaml method=lora
    """
    from spectune.training.rate import measure

    file, pairs = file_and_pairs(settings or [])
    config = load_config(file, [*pairs, "lr=auto", "overwrite=true"])
    found = measure(config, Console(stderr=True, highlight=False))
    if json:
        print_json({**found._asdict(), "tried": [each._asdict() for each in found.tried]})
        return
    console = Console(highlight=False)
    console.print(f"before any step: loss {found.before:.4f}")
    for rate, loss, runs in found.tried:
        console.print(f"{rate:10.2g}  loss {loss:.4f}{f', the mean of {runs} runs' if runs > 1 else ''}")
    console.print(f"lr {found.rate:.2g}: {found.reason}", markup=False, soft_wrap=True)
    say_next("spectune", "train", *([] if file is None else [Path(file)]), *pairs, f"lr={found.rate:.2g}")

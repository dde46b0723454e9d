"""spectune doctor"""

from __future__ import annotations

import typer
from rich.console import Console

from spectune.cli.shared import JSON, print_json
from spectune.progress import Bar


def doctor(json: bool = JSON) -> None:
    """What this machine has, and whether every method works on it: the text to paste into a bug report.

    spectune doctor
    """
    from spectune.training.doctor import examine, text_of

    with Bar(Console(stderr=True), "testing the methods") as bar:
        document = examine(lambda done, total, what: bar(done, what, total))
    if json:
        print_json(document)
    else:
        typer.echo(text_of(document))
    if not document["works"]:
        raise typer.Exit(1)

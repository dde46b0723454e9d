"""spectune eval"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from spectune.cli.shared import DEVICE, JSON, print_json, say_next


def eval_(
    run: Path = typer.Argument(help="A run's folder, as `spectune train` made it."),
    prompts: Path | None = typer.Option(None, help="Prompts of your own: a text file, one a line, or data."),
    data: str | None = typer.Option(None, help="Data to measure on, instead of what the run held out."),
    examples: int = typer.Option(4, min=0, help="Of the held-out records, how many are shown with both answers."),
    max_new_tokens: int = typer.Option(80, min=1, help="Length limit of a reply, in tokens."),
    tasks: str | None = typer.Option(None, help="Tasks of lm-evaluation-harness, as arc_easy,piqa; needs lm_eval."),
    html: Path | None = typer.Option(None, help="Write an HTML page."),
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Base against adapter, side by side: on what was held out, and on prompts of your own.

    spectune eval runs/chats --prompts mine.txt --html eval.html
    """
    from spectune.storage import check_page_place
    from spectune.training.evaluate import evaluate, write_page
    from spectune.transformer2.prompts import read_prompts

    if html is not None:
        check_page_place(html)
    own = read_prompts(prompts) if prompts is not None else []
    document = evaluate(
        run,
        own,
        data=data,
        examples=examples,
        max_new_tokens=max_new_tokens,
        tasks=[task for task in (tasks or "").split(",") if task],
        device=device,
        console=Console(stderr=True, highlight=False),
    )
    if html is not None:
        write_page(document, html)
    if json:
        print_json(document)
        return
    _show(document, html)
    command = "classify" if document["task"] == "classify" else "chat"
    say_next("spectune", command, run)


def _show(document: dict[str, Any], html: Path | None) -> None:
    from spectune.training.evaluate import better, verdict
    from spectune.training.replies import short

    console = Console(highlight=False)
    for reply in document["replies"]:
        console.print(f"prompt   {short(reply['prompt'])}", style="bold", markup=False, soft_wrap=True)
        for name in ("data", "base", "adapter"):
            if reply[name]:
                style = "green" if name == "adapter" else "dim" if name == "data" else ""
                console.print(f"{name:<8} {short(reply[name])}", style=style, markup=False, soft_wrap=True)
        console.print()
    measures = document["measures"]
    for name, base in measures.get("base", {}).items():
        adapted = measures["adapter"][name]
        style = "green" if better(name, base, adapted) else "yellow"
        console.print(f"{name.replace('_', ' '):<16} base {base:8.3f}   adapter {adapted:8.3f}", style=style)
    for side, results in document["harness"].items():
        for task, values in results.items():
            console.print(f"{task}, {side}: {values}", markup=False, soft_wrap=True)
    for note in document["notes"]:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    console.print(verdict(document), style="bold", markup=False, soft_wrap=True)
    if html is not None:
        console.print(f"saved {html}", markup=False, soft_wrap=True)

"""spectune data"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from spectune.cli.shared import JSON, REMOTE_CODE, print_json, say_next
from spectune.cli.train import DATA, DATA_MODEL, data_and_pairs
from spectune.training.config import load_config


def data(
    source: list[str] = DATA,
    model: str = DATA_MODEL,
    task: str = typer.Option("sft", help="sft, classify, dpo or kto."),
    show: int = typer.Option(3, min=0, help="Of the first records, how many are written out."),
    out: Path | None = typer.Option(None, help="Write an HTML page."),
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Show data as a model will see it: what is learned, cut, left out, repeated, and in both parts.

    spectune data chats.jsonl -m smollm2-135m --out data.html
    """
    from spectune.storage import check_page_place
    from spectune.training.inspect import inspect, write_page

    file, pairs = data_and_pairs(source)
    if out is not None:
        check_page_place(out)
    given: dict[str, Any] = {"model": model, "data": file, "task": task, "output": "", "overwrite": True}
    document = inspect(load_config(None, pairs, **given, trust_remote_code=trust_remote_code), show)
    if out is not None:
        write_page(document, out)
    if json:
        print_json(document)
        return
    _show(document, out)
    say_next("spectune", "init", Path(file) if Path(file).exists() else file, "-m", model)


def _show(document: dict[str, Any], out: Path | None) -> None:
    from spectune.training.inspect import caption, sentences

    console = Console(highlight=False)
    for record in document["examples"]:
        for number, example in enumerate(record["examples"], start=1):
            console.print(caption(record, example, number, len(record["examples"])), style="bold", markup=False)
            pieces = ((piece["text"], "green" if piece["learned"] else "dim") for piece in example["pieces"])
            console.print(Text.assemble(*pieces))
    for name, key in (("to learn from", "training"), ("held out", "held_out")):
        part = document.get(key)
        if part is not None:
            of_lengths = ", ".join(f"{value:g} {what}" for what, value in part["lengths"].items())
            learned = (
                f", {part['learned_tokens']} of {part['tokens']} learned" if document["task"] != "classify" else ""
            )
            console.print(
                f"{name}: {part['records']} records, {part['examples']} examples, tokens {of_lengths}{learned}",
                markup=False,
            )
            if "labels" in part:
                console.print("labels: " + ", ".join(f"{n} {c:g}" for n, c in part["labels"].items()), markup=False)
    for sentence in sentences(document):
        console.print(sentence, style="yellow", markup=False)
    if out is not None:
        console.print(f"saved {out}", markup=False, soft_wrap=True)

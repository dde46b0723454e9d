"""spectune import"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import JSON, print_json


def import_(
    folder: Path = typer.Argument(help="A PEFT folder: LoRA, DoRA, converted PiSSA or AdaLoRA."),
    out: Path = typer.Argument(help="Folder for the adapter."),
    json: bool = JSON,
) -> None:
    """Read an adapter that PEFT wrote, check it, and save it here."""
    from spectune.adapters.adapter import Adapter

    adapter = Adapter.from_peft(folder)
    adapter.save(out)
    if json:
        print_json({"output": str(out), "layers": len(adapter.layers), "parameters": adapter.parameter_count()})
        return
    Console().print(f"saved {adapter!r} in {out}", highlight=False, soft_wrap=True, markup=False)

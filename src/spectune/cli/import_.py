"""spectune import"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import JSON, OVERWRITE, print_json, say_chat


def import_(
    folder: Path = typer.Argument(help="A PEFT folder: LoRA, DoRA, converted PiSSA or AdaLoRA."),
    out: Path = typer.Argument(help="Folder for the adapter."),
    overwrite: bool = OVERWRITE,
    json: bool = JSON,
) -> None:
    """Read an adapter that PEFT wrote, check it, and save it here.

    spectune import peft-folder runs/imported
    """
    from spectune.adapters.adapter import Adapter
    from spectune.adapters.destination import check_destination
    from spectune.storage import telling_of_full_disks

    check_destination(out, [folder], overwrite=overwrite)
    adapter = Adapter.from_peft(folder)
    with telling_of_full_disks(out, "what was there is as it was"):
        adapter.save(out)
    if json:
        print_json({"output": str(out), "layers": len(adapter.layers), "parameters": adapter.parameter_count()})
        return
    Console().print(f"saved {adapter!r} in {out}", highlight=False, soft_wrap=True, markup=False)
    say_chat(out, adapter)

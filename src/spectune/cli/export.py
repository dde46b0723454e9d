"""spectune export"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import JSON, REMOTE_CODE, print_json


class Format(str, Enum):
    """What to write."""

    peft = "peft"
    merged = "merged"


def export(
    adapter: Path = typer.Argument(help="The adapter's folder."),
    out: Path = typer.Argument(help="Folder for the result."),
    format: Format = typer.Option(
        Format.peft, help="A PEFT LoRA folder, or the whole model with the update folded in."
    ),
    rank: int | None = typer.Option(None, min=1, help="For peft: the best LoRA of this rank, not an exact one."),
    base: str | None = typer.Option(None, help="The base model; the adapter's own by default."),
    dtype: str | None = typer.Option("fp32", help="For merged: the dtype of the written model."),
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Write an adapter as a PEFT LoRA folder, or merged into its model."""
    from spectune.adapters.adapter import Adapter
    from spectune.bases.loading import base_name, bind_to_base, load_base
    from spectune.model.adapting import attach
    from spectune.model.merging import merge

    loaded = Adapter.load(adapter)
    if format is Format.merged:
        name, labels = base_name(loaded, base), loaded.labels
        model, tokenizer = load_base(name, dtype, labels=labels, new_head=True, trust_remote_code=trust_remote_code)
        merge(attach(model, loaded), keep=False).save_pretrained(out)
        tokenizer.save_pretrained(out)
        error = 0.0
    else:
        error = bind_to_base(loaded, base).export(out, "peft", rank=rank).error
    if json:
        print_json({"output": str(out), "format": format.value, "error": error})
        return
    note = f", relative error {error:.2e}" if format is Format.peft else ""
    Console().print(f"saved {out}{note}", highlight=False, soft_wrap=True, markup=False)

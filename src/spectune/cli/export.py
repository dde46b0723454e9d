"""spectune export"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console

from spectune.cli.shared import ALLOW_LOSS, CHECK, JSON, OVERWRITE, REMOTE_CODE, print_json
from spectune.errors import SpectuneError


class Format(str, Enum):
    """What to write."""

    peft = "peft"
    diffusers = "diffusers"
    merged = "merged"


def export(
    adapter: Path = typer.Argument(help="The adapter's folder."),
    out: Path = typer.Argument(help="Folder for the result."),
    format: Format = typer.Option(
        Format.peft,
        help="A PEFT LoRA folder, the file that diffusers' pipelines load, or the model with the update folded in.",
    ),
    rank: int | None = typer.Option(None, min=1, help="For a LoRA: the best of this rank, not an exact one."),
    one_rank: bool = typer.Option(
        False,
        "--one-rank",
        help="For peft: one rank and alpha for all layers, as llama.cpp reads them.",
    ),
    component: str | None = typer.Option(
        None,
        help="For diffusers: the pipeline's component, unet or transformer say; told from the model by default.",
    ),
    base: str | None = typer.Option(None, help="The base model; the adapter's own by default."),
    dtype: str | None = typer.Option("fp32", help="For merged: the dtype of the written model."),
    check: bool = CHECK,
    overwrite: bool = OVERWRITE,
    allow_loss: bool = ALLOW_LOSS,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Write an adapter as a LoRA for PEFT or diffusers, or merged into its model.

    spectune export runs/pirate merged --format merged
    """
    from spectune.adapters.adapter import Adapter
    from spectune.adapters.destination import check_destination
    from spectune.bases.loading import base_name, bind_to_base, load_base
    from spectune.bases.merged import write_merged
    from spectune.model.adapting import attach
    from spectune.storage import telling_of_full_disks

    merged = format is Format.merged
    if component is not None and format is not Format.diffusers:
        raise SpectuneError(f"--component is for --format diffusers, and not for {format.value}")
    check_destination(out, [adapter, *([base] if base else [])], overwrite=overwrite, merged=merged)
    loaded = Adapter.load(adapter)
    error = 0.0
    if merged:
        name, labels = base_name(loaded, base), loaded.labels
        check_destination(out, [name], overwrite=overwrite, merged=True)
        model, tokenizer = load_base(name, dtype, labels=labels, new_head=True, trust_remote_code=trust_remote_code)
        write_merged(attach(model, loaded, check=check), tokenizer, out, name, adapter)
    else:
        bound = bind_to_base(loaded, base, check=check)
        with telling_of_full_disks(out, "what was there is as it was"):
            kind: Literal["peft", "diffusers"] = "diffusers" if format is Format.diffusers else "peft"
            options: dict[str, Any] = {
                "rank": rank,
                "one_rank": one_rank,
                "allow_loss": allow_loss,
                "component": component,
            }
            error = bound.export(out, kind, **options).error
    if json:
        print_json({"output": str(out), "format": format.value, "error": error})
        return
    note = "" if merged else f", relative error {error:.2e}"
    Console().print(f"saved {out}{note}", highlight=False, soft_wrap=True, markup=False)

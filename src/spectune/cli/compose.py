"""spectune compose"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import ALLOW_LOSS, JSON, OVERWRITE, print_json, say_chat, weighted


def compose(
    out: Path = typer.Argument(help="Folder for the sum."),
    terms: list[str] = typer.Argument(
        metavar="FOLDER[:WEIGHT]...", help="Adapters' or runs' folders with weights, negative ones too."
    ),
    rank: int | None = typer.Option(None, help="Compress the sum to the best LoRA of this rank."),
    base: str | None = typer.Option(
        None, help="The base model, where a basis is needed; the adapters' own by default."
    ),
    overwrite: bool = OVERWRITE,
    allow_loss: bool = ALLOW_LOSS,
    json: bool = JSON,
) -> None:
    """Add adapters: spectune compose OUT pirate:0.7 chef:0.3 legalese:-0.2

    spectune compose runs/mix runs/pirate:0.7 runs/chef:0.3
    """
    from spectune.adapters.adapter import Adapter
    from spectune.adapters.destination import check_destination
    from spectune.bases.loading import bind_to_base
    from spectune.storage import telling_of_full_disks

    folders = [weighted(term) for term in terms]
    check_destination(out, [folder for folder, _ in folders], overwrite=overwrite)
    weighted_terms = [(Adapter.load(folder), weight) for folder, weight in folders]
    total = None
    for adapter, weight in weighted_terms:
        part = adapter if weight == 1.0 else weight * adapter
        total = part if total is None else total + part
    assert total is not None
    if rank is not None:
        exact = bind_to_base(total, base)
        total = exact.compress(rank)
        if not allow_loss:
            exact.check_loss(total)
    with telling_of_full_disks(out, "what was there is as it was"):
        total.save(out)
    if json:
        print_json({"output": str(out), "parameters": total.parameter_count(), "error": total.error})
        return
    error = f", relative error {total.error:.2e}" if rank is not None else ""
    Console().print(f"saved {total!r} in {out}{error}", highlight=False, soft_wrap=True, markup=False)
    say_chat(out, total)

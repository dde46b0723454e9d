"""spectune init"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from spectune.cli.shared import JSON, OVERWRITE, REMOTE_CODE, print_json, say_next, typed
from spectune.cli.train import DATA, DATA_MODEL, data_and_pairs
from spectune.errors import SpectuneError
from spectune.progress import working


def init(
    source: list[str] = DATA,
    model: str = DATA_MODEL,
    out: Path = typer.Option(Path("run.yaml"), "--out", "-o", help="The file to write."),
    overwrite: bool = OVERWRITE,
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """Look at data and write a run.yaml for it, each setting with its reason.

    spectune init chats.jsonl -m smollm2-135m
    """
    from spectune.storage import check_place
    from spectune.training.start import propose, write

    file, pairs = data_and_pairs(source)
    if out.is_dir():
        raise SpectuneError(f"{out} is a folder: name a file, --out {out / 'run.yaml'}")
    if out.exists() and not overwrite:
        raise SpectuneError(f"{out} is there already: give --overwrite, or another --out")
    check_place(out)
    console = Console(stderr=True, highlight=False)
    with working(console, "looking at the data"):
        start = propose(file, model, pairs, trust_remote_code=trust_remote_code)
    write(start, out, typed("spectune", "init", file, "-m", model, *pairs))
    if json:
        settings = {key: {"value": value, "reason": reason} for key, value, reason in start.settings}
        print_json({"file": str(out), "summary": start.summary, "settings": settings, "notes": start.notes})
        return
    console = Console(highlight=False)
    for note in start.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    console.print(start.summary, style="bold", markup=False, soft_wrap=True)
    wide = max(len(setting.key) for setting in start.settings)
    for key, value, reason in start.settings:
        why = f"  # {reason}" if reason else ""
        shown = "-" if value is None else value
        console.print(f"  {key:<{wide}}  {shown}{why}", markup=False, soft_wrap=True)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    say_next("spectune", "train", out)

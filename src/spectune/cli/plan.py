"""spectune plan"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from spectune.cli import completion
from spectune.cli.shared import JSON, REMOTE_CODE, print_json, say_next
from spectune.errors import SpectuneError
from spectune.pages.units import gigabytes
from spectune.progress import Bar


def plan(
    model: str = typer.Argument(
        autocompletion=completion.models,
        help="A built-in or embedded name (llama-3-8b, smollm2-135m), a folder, or a run's, whose settings are taken.",
    ),
    method: list[str] = typer.Option(
        [],
        "--method",
        "-m",
        autocompletion=completion.methods,
        help="name:field=value,...; may be repeated. All if not given.",
    ),
    targets: list[str] = typer.Option([], "--targets", help="Suffixes, or one regex; all-linear if not given."),
    exclude: list[str] = typer.Option([], help="Suffixes, or one regex, of layers to leave out."),
    override: list[str] = typer.Option([], metavar="PATTERN=METHOD", help="Another method, or null, for some layers."),
    batch_size: int | None = typer.Option(None, min=1, help="Sequences on each device; 8 if not given."),
    length: int | None = typer.Option(None, min=1, help="Tokens of a sequence; 512 if not given."),
    supervised: float = typer.Option(1.0, help="Share of the positions with a loss, in (0, 1]."),
    gradient_checkpointing: str | None = typer.Option(
        None,
        metavar="selective|true|false",
        help="What the backward pass computes again, as in train; selective if not given.",
    ),
    precision: list[str] = typer.Option(
        [],
        "--precision",
        "-p",
        help="fp32, bf16, 8bit, 4bit or 4bit:rank=16; may be repeated. fp32, bf16 and 4bit if not given.",
    ),
    devices: str = typer.Option("1", help="With FSDP2: a number, several (1,4,8) or a range (1-8)."),
    memory: str | None = typer.Option(None, help="Of a device (24 is 24GB): the largest batch; 8 to 80 if not given."),
    budget: str | None = typer.Option(None, help="Trained parameters (100k): the rank or width that keeps it."),
    measure: bool = typer.Option(True, help="Time decompositions and products here, once; or take stored rates."),
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """What each method trains, stores, holds and costs on a model, without its weights.

    spectune plan llama-3-8b --memory 24
    spectune plan runs/chats -m lora -m dora
    """
    from spectune.adapters.folder import CONFIG
    from spectune.bases.runs import SETTINGS, settings_of
    from spectune.planning.of_run import settings_for
    from spectune.planning.plan import parse_devices
    from spectune.planning.plan import plan as make

    again: object = {"true": True, "false": False}.get(gradient_checkpointing or "", gradient_checkpointing)
    given = {
        "methods": method,
        "targets": _patterns(targets),
        "exclude": _patterns(exclude),
        "overrides": dict(map(_override, override)),
        "batch_size": batch_size,
        "length": length,
        "gradient_checkpointing": again,
        "precisions": precision,
    }
    settings = {**settings_for(model), **{key: value for key, value in given.items() if value not in (None, [], {})}}
    with Bar(Console(stderr=True), "counting what each method takes") as bar:
        found = make(
            **settings,
            supervised=supervised,
            devices=parse_devices(devices),
            memory=memory,
            budget=budget,
            measured=measure,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: bar(done, total=total),
        )
    if json:
        print_json(found.to_dict())
        return
    _show(found.to_dict(), settings.get("precisions", ["bf16"])[0], memory)
    if settings_of(model) is not None:
        ended = (Path(model) / CONFIG).is_file()
        say_next("spectune", *(("eval", Path(model)) if ended else ("train", Path(model, SETTINGS), "resume=true")))
    else:
        say_next("spectune", "init", "DATA", "-m", Path(model) if Path(model).is_dir() else model)


def _patterns(given: list[str]) -> object:
    return given[0] if len(given) == 1 else given


def _override(text: str) -> tuple[str, str | None]:
    pattern, equals, method = text.partition("=")
    if not equals:
        raise SpectuneError(f"--override: {text!r} is not PATTERN=METHOD")
    return pattern, None if method.lower() in ("null", "none", "") else method


Found = dict[str, Any]  # what `planning.plan` returned


def _show(found: Found, main: str, memory: str | None) -> None:
    def size(value: float | None) -> str:
        return "-" if value is None else gigabytes(value)

    console, counts, precisions = Console(), _device_counts(found), list(found["floor_seconds"])
    if len(counts) > 1:
        held = [(main, count, f"on {count}") for count in counts]
    else:
        held = [(p, counts[0], p if len(precisions) > 1 else "memory") for p in precisions]
    columns = ["method", "trained", "file", "start", *(heading for _, _, heading in held), "step"]
    columns += ["batch"] * (memory is not None) + ["budget"] * ("budget" in found["rows"][0])
    table = Table(box=None, pad_edge=False, title=f"{found['model']}: {found['parameters']:,} parameters")
    for column in columns:
        words = column in ("method", "budget")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=column != "budget")
    for row in found["rows"]:
        at = row["precisions"]
        totals = [size(at[p]["memory"][count]["total"]) if at[p] else "-" for p, count, _ in held]
        step = at[main] and at[main]["step_over_floor"]
        cells = [row["method"], _count(row["trainable_parameters"]), size(row["adapter_bytes"])]
        cells += [_seconds(row["setup_seconds"]), *totals, "-" if step is None else f"{step:.2f}"]
        if memory is not None:
            batch = at[main] and at[main]["memory"][counts[0]]["largest_batch"]
            cells.append("-" if batch is None else f"{batch:,}")
        if "budget" in row:
            cells.append(row["budget"]["method"] if row["budget"] else "none")
        table.add_row(*cells)
    console.print(table)
    if memory is None:
        _show_fits(console, found, main, counts[0])
    batch, floor = found["batch"], _seconds(found["floor_seconds"][main])
    fits = f" batch: sequences that fit {memory} in {main}." if memory is not None else ""
    console.print(
        f"memory: in all on each device, {batch['rows']} x {batch['length']} tokens. step: {main}, over the frozen "
        f"model's forward and gradient to its input ({floor}). start: adapting, no decomposition cached. "
        f"Times: {found['times']}.{fits}",
        highlight=False,
    )
    for note in found["notes"]:
        console.print(note, style="yellow", markup=False, highlight=False)


def _show_fits(console: Console, found: Found, main: str, count: str) -> None:
    """Show the largest batch on devices of the usual sizes."""
    rows = [(row["method"], row["precisions"][main]) for row in found["rows"] if row["precisions"][main]]
    sizes = list(rows[0][1]["memory"][count]["fits"]) if rows else []
    table = Table(box=None, pad_edge=False, title=f"sequences of {found['batch']['length']} that fit, in {main}")
    table.add_column("method", no_wrap=True)
    for size in sizes:
        table.add_column(f"{size} GB", justify="right", no_wrap=True)
    for method, at in rows:
        fits = at["memory"][count]["fits"]
        table.add_row(method, *("-" if not fits[size] else f"{fits[size]:,}" for size in sizes))
    console.print(table)


def _device_counts(found: Found) -> list[str]:
    for row in found["rows"]:
        for at in row["precisions"].values():
            if at:
                return list(at["memory"])
    return ["1"]


def _count(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if value >= size:
            return f"{value / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"

"""spectune plan"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from spectune.cli.shared import JSON, REMOTE_CODE, print_json
from spectune.errors import SpectuneError


def plan(
    model: str = typer.Argument(help="A built-in or embedded name (llama-3-8b, smollm2-135m), or a folder."),
    method: list[str] = typer.Option(
        [], "--method", "-m", help="name:field=value,...; may be repeated. All if not given."
    ),
    targets: list[str] = typer.Option([], "--targets", help="Suffixes, or one regex; all-linear if not given."),
    exclude: list[str] = typer.Option([], help="Suffixes, or one regex, of layers to leave out."),
    override: list[str] = typer.Option([], metavar="PATTERN=METHOD", help="Another method, or null, for some layers."),
    batch_size: int = typer.Option(8, min=1, help="Sequences on each device."),
    length: int = typer.Option(512, min=1, help="Tokens of a sequence."),
    supervised: float = typer.Option(1.0, help="Share of the positions with a loss, in (0, 1]."),
    precision: list[str] = typer.Option(
        [], "--precision", "-p", help="fp32, bf16 or 4bit; may be repeated. The table shows the first (bf16)."
    ),
    devices: str = typer.Option("1", help="With FSDP2: a number, several (1,4,8) or a range (1-8)."),
    memory: str | None = typer.Option(None, help="Of a device (24GB): the largest batch that fits."),
    budget: str | None = typer.Option(None, help="Trained parameters (100k): the rank or width that keeps it."),
    measure: bool = typer.Option(True, help="Time decompositions and products here, once; or take stored rates."),
    trust_remote_code: bool = REMOTE_CODE,
    json: bool = JSON,
) -> None:
    """What each method trains, stores, holds and costs on a model, without its weights."""
    from spectune.reports.plan import PRECISIONS, parse_devices
    from spectune.reports.plan import plan as make

    found = make(
        model,
        method,
        targets=_patterns(targets) or "all-linear",
        exclude=_patterns(exclude),
        overrides=dict(map(_override, override)),
        batch_size=batch_size,
        length=length,
        supervised=supervised,
        precisions=precision or PRECISIONS,
        devices=parse_devices(devices),
        memory=memory,
        budget=budget,
        measured=measure,
        trust_remote_code=trust_remote_code,
        progress=_progress(Console(stderr=True)),
    )
    if json:
        print_json(found.to_dict())
        return
    _show(found.to_dict(), precision[0] if precision else "bf16", memory)


def _patterns(given: list[str]) -> Any:
    return given[0] if len(given) == 1 else given


def _override(text: str) -> tuple[str, str | None]:
    pattern, equals, method = text.partition("=")
    if not equals:
        raise SpectuneError(f"--override: {text!r} is not PATTERN=METHOD")
    return pattern, None if method.lower() in ("null", "none", "") else method


def _progress(console: Console) -> Any:
    def show(done: int, total: int) -> None:
        console.print(f"{done} of {total} methods", end="\r" if done < total else "\r\x1b[K", highlight=False)

    return show if console.is_terminal else None


def _show(found: dict[str, Any], precision: str, memory: str | None) -> None:
    from spectune.reports.sizes import gigabytes

    console = Console()
    fewest, *more = _device_counts(found)
    columns = ["method", "trained", "file", "start", "memory", "step"]
    extra = [f"on {n}" for n in more]
    extra += ["batch"] if memory else []
    extra += ["budget"] if "budget" in found["rows"][0] else []
    table = Table(title=f"{found['model']}, {found['parameters']:,} parameters, {precision}", pad_edge=False, box=None)
    for column in [*columns[:5], *extra[: len(more)], columns[5], *extra[len(more) :]]:
        table.add_column(column, justify="left" if column in ("method", "budget") else "right", overflow="fold")

    def size(value: float | None) -> str:
        return "-" if value is None else gigabytes(value)

    for row in found["rows"]:
        at = row["precisions"].get(precision) or {}
        held = at.get("memory", {})
        totals = [size(held[n]["total"]) if n in held else "-" for n in (fewest, *more)]
        step = "-" if at.get("step_over_floor") is None else f"{at['step_over_floor']:.2f}"
        cells = [row["method"], _count(row["trainable_parameters"]), size(row["adapter_bytes"])]
        cells += [_seconds(row["setup_seconds"]), *totals, step]
        if memory:
            batch = held.get(fewest, {}).get("largest_batch")
            cells.append("-" if batch is None else f"{batch:,}")
        if "budget" in row:
            cells.append(row["budget"]["method"] if row["budget"] else "none")
        table.add_row(*cells)
    console.print(table)
    batch, floor = found["batch"], _seconds(found["floor_seconds"].get(precision))
    console.print(
        f"memory: on each device, at {batch['rows']} x {batch['length']} tokens. step: over the frozen model's forward "
        f"and gradient to its input ({floor}). start: adapting, no decomposition cached. Times: {found['times']}.",
        highlight=False,
    )
    for note in found["notes"]:
        console.print(note, style="yellow", markup=False)


def _device_counts(found: dict[str, Any]) -> list[str]:
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

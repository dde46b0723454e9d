"""spectune cache"""

from __future__ import annotations

from datetime import datetime

import typer
from rich.console import Console
from rich.table import Table

from spectune.cli.shared import JSON, print_json

app = typer.Typer(help="The cache of decompositions.", no_args_is_help=True)


@app.command()
def ls(json: bool = JSON) -> None:
    """List the entries, the most recently used first, and their folder.

    spectune cache ls
    """
    from spectune.spectral import cache

    entries = cache.ls()
    if json:
        print_json([{**entry._asdict(), "path": str(entry.path)} for entry in entries])
        return
    table = Table("entry", "kind", "rank", "weight", "bytes", "used")
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).isoformat(" ", "seconds")
        shape = " x ".join(map(str, entry.shape))
        table.add_row(entry.key[:12], entry.kind, str(entry.rank or "all"), shape, f"{entry.bytes:,}", used)
    console = Console()
    if entries:
        console.print(table)
    total = sum(entry.bytes for entry in entries)
    where = cache.directory() or "no folder: the cache is off"
    console.print(
        f"{len(entries)} entries, {total:,} bytes of {cache.limit():,}, in {where}", highlight=False, soft_wrap=True
    )


@app.command()
def prune(
    max_bytes: int | None = typer.Option(None, min=0, help="Bytes to keep; the cache's limit if not given."),
    json: bool = JSON,
) -> None:
    """Delete the entries used longest ago until the rest fit.

    spectune cache prune --max-bytes 2000000000
    """
    from spectune.spectral import cache

    _report("deleted", cache.prune(max_bytes), json)


@app.command()
def verify(json: bool = JSON) -> None:
    """Check every entry against its checksum, and delete the damaged ones; they are computed anew when needed.

    spectune cache verify
    """
    from spectune.spectral import cache

    _report("damaged", cache.verify(), json)


def _report(what: str, keys: list[str], json: bool) -> None:
    if json:
        print_json({what: keys})
    else:
        Console().print(f"{len(keys)} {what}", highlight=False)

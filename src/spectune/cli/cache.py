"""spectune cache"""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from spectune.cli.shared import JSON, print_json

app = typer.Typer(help="The cache of decompositions.", no_args_is_help=True)


@app.command()
def ls(json: bool = JSON) -> None:
    """List the entries, the least recently used first."""
    from spectune.spectral import cache

    entries = cache.ls()
    if json:
        print_json([entry._asdict() for entry in entries])
        return
    table = Table("entry", "bytes", "used")
    for entry in entries:
        table.add_row(entry.key, f"{entry.bytes:,}", entry.used)
    Console().print(table)


@app.command()
def prune(
    max_bytes: int = typer.Option(0, min=0, help="Keep this many bytes of the most recently used."),
    json: bool = JSON,
) -> None:
    """Remove entries, the least recently used first."""
    from spectune.spectral import cache

    removed = cache.prune(max_bytes)
    print_json({"removed": removed}) if json else Console().print(f"removed {removed} entries", highlight=False)


@app.command()
def verify(json: bool = JSON) -> None:
    """Check every entry against its checksum, and remove those that are damaged."""
    from spectune.spectral import cache

    damaged = cache.verify()
    print_json({"damaged": damaged}) if json else Console().print(
        f"{len(damaged)} damaged entries removed", highlight=False
    )

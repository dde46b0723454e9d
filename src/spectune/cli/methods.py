"""spectune methods"""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from spectune.cli.shared import JSON, print_json


def methods(json: bool = JSON) -> None:
    """List the methods, their options with defaults, and their papers.

    spectune methods
    """
    from spectune.methods import Method, to_text
    from spectune.methods.registry import load_plugins

    rows = []
    for name, cls in load_plugins().items():
        fields = {
            field.name: to_text(value) if isinstance(value := getattr(cls(), field.name), Method) else value
            for field in dataclasses.fields(cls)
        }
        rows.append({"method": name, "update": cls.summary, "options": fields, "paper": cls.paper})
    if json:
        print_json(rows)
        return
    table = Table("method", "update", "options", "paper", row_styles=["", "dim"])
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(row["method"], row["update"], options, row["paper"])
    Console().print(table)

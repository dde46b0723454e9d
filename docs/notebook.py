"""Make examples/quickstart.ipynb of docs/quickstart.md: what it says as text, and its code and commands as cells.

python docs/notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "quickstart.md", ROOT / "examples" / "quickstart.ipynb"
_HERE = ", here or as a [notebook](../examples/quickstart.ipynb)"
_CODE, _COMMANDS = r"```python\n(?P<code>.*?)```\n", r"(?P<commands>(?:^    spectune [^\n]*\n)+)"
_PARTS = re.compile(f"{_CODE}|{_COMMANDS}", re.DOTALL | re.MULTILINE)


def notebook(page: str) -> dict[str, Any]:
    """Return the notebook of a page; a command that talks with its user stays text, for a terminal."""
    cells, text, at = [], "", 0

    def end_text() -> None:
        if text.strip():
            linked = re.sub(r"\]\((\w+\.md)", r"](../docs/\1", text.strip().replace(_HERE, ""))
            cells.append({"cell_type": "markdown", "source": linked})

    for part in _PARTS.finditer(page):
        text += page[at : part.start()]
        at = part.end()
        commands = [line.strip() for line in (part["commands"] or "").splitlines()]
        if any(line.startswith("spectune chat") for line in commands):
            text += part[0]
            continue
        end_text()
        text = ""
        source = part["code"] or "".join(f"!{line}\n" for line in commands)
        cells.append({"cell_type": "code", "source": source.strip(), "execution_count": None, "outputs": []})
    text += page[at:]
    end_text()
    numbered = [{"id": f"cell-{i}", "metadata": {}, **cell} for i, cell in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": numbered, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    made = notebook(PAGE.read_text(encoding="utf-8"))
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What mkdocs does beside its theme: formulas become MathML, and files beside docs are shown or named.

So a page loads no script for its formulas, which are written as on GitHub, $...$ and $$...$$, and no
link of the site leads out of it into the repository.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_PICTURE = re.compile(r"\((?:\.\./)+(benchmarks/[\w./-]+\.png)\)")
_BESIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|examples|tests|src)[\w./-]*)\)")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pictures of benchmarks that pages show."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    shown = {found for file in files.documentation_pages() for found in _PICTURE.findall(file.content_string)}
    for name in sorted(shown):
        files.append(File.generated(config, f"images/{Path(name).name}", abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **others: Any) -> str:
    """Let pictures of benchmarks be found in the site, and name other files of the repository."""
    up = "../" * page.file.src_uri.count("/")
    markdown = _PICTURE.sub(lambda found: f"({up}images/{Path(found[1]).name})", markdown)
    return _BESIDE.sub(
        lambda found: found[1] if found[1].strip("`") == found[2] else f"{found[1]} (`{found[2]}`)", markdown
    )


def on_page_content(html: str, **others: Any) -> str:
    """Typeset the formulas of a page.

    Raises:
        ValueError: one cannot be read, or has a command that would stand there as it is written.
    """
    return _FORMULA.sub(_typeset, html)


def _typeset(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    made = convert(unescape(found[3]).strip(), display=display)
    if "\\" in made:
        raise ValueError(f"the formula {found[3]!r} was not understood: {made}")
    return f'<div class="formula">{made}</div>' if display == "block" else made

"""Every command that README and docs show is there and takes the arguments that it is shown with."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from spectune.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page):
    """Return the words of a page's commands, without synopses ([...], a|b), continued lines, and words beside them."""
    for line in re.findall(r"^    (?:\w+=\S+ )?spectune (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        line = re.sub(r" {2,}\S.*$", "", line)
        if not re.search(r"[\[\]|\\]|\.\.\.", line):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_are_taken(page):
    for words in commands(page):
        command, names = get_command(app), []
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            names.append(words.pop(0))
            assert names[-1] in command.commands, names
            command = command.commands[names[-1]]
        if not hasattr(command, "commands"):
            command.make_context(names[-1], words)

"""What the quick start shows works as it stands there, and so does its notebook, on a tiny model."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from cli.typed import run
from training.folder import save_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
MORE = {"train": ["max_steps=2", "device=cpu"], "chat": ["--max-new-tokens", "2"], "eval": ["--device", "cpu"]}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(save_folder(tmp_path / "model"))


def typed(line, model):
    """Run a command of the page on the tiny model."""
    words = [model if word == "smollm2-135m" else word for word in shlex.split(line)]
    run(*words, *MORE.get(words[0], []), stdin="/both\nsay one\n/quit\n" if words[0] == "chat" else None)


def test_every_command_of_the_quick_start_runs(tmp_path, model):
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {})  # type: ignore[index]
    for line in re.findall(r"^    spectune (.*)$", PAGE, re.MULTILINE):
        typed(line, model)
    assert (tmp_path / "eval.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()


def test_its_notebook_runs_and_is_made_of_it(tmp_path, model, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    try:
        from notebook import NOTEBOOK, notebook
    finally:
        sys.modules.pop("notebook", None)
    written = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert written == notebook(PAGE), "python docs/notebook.py"
    names = {}
    for cell in written["cells"]:
        if cell["cell_type"] == "code" and not cell["source"].startswith("!"):
            exec(cell["source"], names)
        elif cell["cell_type"] == "code":
            for line in cell["source"].splitlines():
                typed(line.removeprefix("!spectune "), model)
    assert (tmp_path / "merged" / "config.json").is_file()

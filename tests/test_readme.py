"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from spectune.cli import app
from spectune.cli.train import file_and_pairs
from spectune.compare.config import CompareConfig
from spectune.training.config import TrainConfig, load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    (spectune .*)$", README, re.MULTILINE)]


def test_the_python_example_runs_as_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "assert replies.shape[0] == 2 and mix.parameter_count() > 0\n"
    script = tmp_path / "example.py"
    script.write_text(code + check, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", script.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"pirate", "pirate-peft"}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
def test_its_commands_are_there_and_take_what_it_gives_them(words):
    command = get_command(app).commands[words[1]]
    if words[1] in ("train", "compare"):
        kind = TrainConfig if words[1] == "train" else CompareConfig
        assert load_config(*file_and_pairs(words[2:]), kind).model == "smollm2-135m"
    else:
        command.make_context(words[1], words[2:], resilient_parsing=False)


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not link.startswith("https:") and not (ROOT / link).exists()] == []

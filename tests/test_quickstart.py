"""What the quick start shows works as it stands there, on a tiny model."""

import re
import shlex
from pathlib import Path

from cli.test_commands import run
from training.folder import save_folder

PAGE = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")


def test_every_command_of_the_quick_start_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(save_folder(tmp_path / "model"))
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {})  # type: ignore[index]
    for line in re.findall(r"^    spectune (.*)$", PAGE, re.MULTILINE):
        words = [model if word == "smollm2-135m" else word for word in shlex.split(line)]
        more = {"train": ["max_steps=2", "device=cpu"], "chat": ["--max-new-tokens", "2"], "eval": ["--device", "cpu"]}
        run(*words, *more.get(words[0], []), stdin="/both\nsay one\n/quit\n" if words[0] == "chat" else None)
    assert (tmp_path / "eval.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()

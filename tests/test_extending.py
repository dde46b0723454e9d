"""What docs/extending.md shows works as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = dict(re.findall(r'```python title="([\w.]+)"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in BLOCKS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(folder, *arguments):
    source = str(Path(__file__).parents[1] / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, str(Path(__file__).parent)])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


def test_the_contracts_are_proven_as_the_page_says(folder):
    done = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_methods.py", "test_cores.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_a_method_and_a_task_of_a_file_train_save_and_load(folder):
    script = """
import json, sys
import spectune
from training.folder import save_folder
from spectune.training.config import load_config
from spectune.training.run import train
save_folder("model")
with open("texts.jsonl", "w", encoding="utf-8") as file:
    for i in range(24):
        file.write(json.dumps({"text": "one two " * (1 + i % 12)}) + "\\n")
settings = ["model=model", "data=texts.jsonl", "output=out", "method=methods:ColumnScale", "task=tasks:Short"]
result = train(load_config(None, [*settings, "most_words=9", "max_steps=2", "held_out=0.2", "dtype=fp32"]))
print(repr(result.adapter))
"""
    (folder / "train_it.py").write_text(script, encoding="utf-8")
    done = run(folder, "-W", "ignore", "train_it.py")
    assert done.returncode == 0, done.stderr
    assert "column_scale on" in done.stdout
    unknown = run(folder, "-W", "ignore", "-c", "import spectune; spectune.Adapter.load('out')")
    assert "unknown method 'column_scale'" in unknown.stderr
    known_first = "import spectune; from spectune.methods import parse; parse('methods:ColumnScale'); "
    opened = known_first + "print(spectune.Adapter.load('out'))"
    known = run(folder, "-W", "ignore", "-c", opened)
    assert "column_scale on" in known.stdout, known.stderr
    listed = run(folder, "-m", "spectune", "--plugin", "register_all", "methods", "--json")
    assert "no module 'register_all'" in listed.stderr
    assert listed.returncode == 2


def test_a_wrong_task_is_told_in_one_sentence(folder):
    for task, sentence in (("tasks:Long", "has no 'Long'"), ("report", "no task 'report'"), ("json:loads", "subclass")):
        done = run(folder, "-m", "spectune", "train", f"task={task}", "model=m", "data=d", "output=o")
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_the_report_reads_the_document(folder):
    document = {"methods": [{"method": "lora", "trainable_parameters": 5, "metric": {"mean": 0.5}}]}
    (folder / "report.json").write_text(json.dumps(document), encoding="utf-8")
    assert run(folder, "report.py", "report.json").stdout == "lora 5 0.5\n"

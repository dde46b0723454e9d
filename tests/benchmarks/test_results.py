"""Results of benchmarks by processor: their files, and the worst and the best of several."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _machine
        import table
    finally:
        sys.path.remove(str(BENCHMARKS))
    return _machine, table


def test_every_file_is_named_by_its_processor(modules):
    files = list((BENCHMARKS / "results").glob("*.json"))
    assert files
    for file in files:
        name, where = file.name.removesuffix(".json").split(".")
        machine = json.loads(file.read_text(encoding="utf-8"))["machine"]
        assert modules[0].processor({"accelerator": None, "processor": machine.get("cpu"), **machine}) == where, name


def test_what_is_saved_is_found_by_processor(modules, tmp_path, monkeypatch):
    machine = modules[0]
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    here = {"accelerator": None, "processor": "A Processor (family 1, model 2)"}
    monkeypatch.setattr(machine, "describe", lambda: here)
    machine.save("speed", {"x": 1})
    here = {"accelerator": "NVIDIA H200", "processor": "A Processor"}
    machine.save("speed", {"x": 2})
    machine.save("speed_more", {"x": 3})
    found = machine.saved("speed")
    assert {where: run["x"] for where, run in found.items()} == {"a-processor-family-1-model-2": 1, "nvidia-h200": 2}
    assert machine.saved("nothing") == {}


def test_the_worst_and_the_best(modules):
    spread = modules[0].spread
    assert spread({}, "{:.1f}".format) == spread({"a": None}, "{:.1f}".format) == ""
    assert spread({"a": 1.5, "b": None}, "{:.1f}".format) == "1.5"
    assert spread({"a": 1.0, "b": 3.0, "c": 2.0}, "{:.1f}".format) == "3.0 to 1.0"
    assert spread({"a": 1.0, "b": 3.0}, "{:.1f}".format, max) == "1.0 to 3.0"
    assert spread({"a": 1.0, "b": 1.01}, "{:.1f}".format) == "1.0"


def test_the_tables_are_those_of_the_pages(modules, capsys):
    modules[1].print_decompose()
    printed = capsys.readouterr().out
    performance = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    page = (BENCHMARKS.parent / "docs" / "spectral.md").read_text(encoding="utf-8")
    rows = printed.strip().splitlines()
    assert len(rows) > 10
    assert all(row in performance or row in page for row in rows[2:])
    modules[1].print_plan()
    page = (BENCHMARKS.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    assert all(row in page for row in capsys.readouterr().out.strip().splitlines()[2:])


def test_a_row_of_several_processors(modules):
    one = {"ours_s": 1.0, "theirs_s": 4.0, "ratio": 4.0, "target": 5, "reached": False, "runs": 2, "load": 1.0}
    other = {**one, "ours_s": 0.5, "ratio": 8.0, "reached": True}
    assert modules[1].row("a", {"x": one}) == "| a | 1 | 4 | 4 | >= 5 | no | 2 | 1.0 |"
    assert modules[1].row("a", {"x": one, "y": other}) == "| a | 1 to 0.5 | 4 | 4 to 8 | >= 5 | no | 2 | 1.0 |"

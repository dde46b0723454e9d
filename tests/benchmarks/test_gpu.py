"""The check of a GPU in its tiny form, on the CPU, where none of the packages is that it can do without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("correctness", "steps", "decompositions", "many", "job", "kernels")
ABSENT = ("datasets", "trl", "gguf", "peft", "ray")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from gpu import correctness, part, run
    finally:
        sys.path.remove(str(BENCHMARKS))
    return {"correctness": correctness, "part": part, "run": run}


def test_every_part_runs_and_says_so(tmp_path):
    code = [
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r}))",
        f"sys.argv[1:] = ['--tiny', '--out', {str(tmp_path)!r}]",
        f"runpy.run_path({str(BENCHMARKS / 'gpu' / 'run.py')!r}, run_name='__main__')",
    ]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    shown = done.stdout.partition("\n\n")[2]
    for name in PARTS:
        (file,) = tmp_path.glob(f"gpu_tiny_{name}.*.json")
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["machine"]["versions"]["torch"]
        reasons = {row.get("skipped") for row in found["rows"].values()} - {None}
        assert reasons <= {"kernels are for a GPU", "peft is not installed", "datasets is not installed"}
        assert f"{name}: " in shown


def test_every_method_is_looked_at(gpu):
    from spectune.methods import METHODS, parse

    texts = [parse(text) for text in gpu["correctness"].METHODS]
    assert {method.name for method in texts} == set(METHODS)
    assert len(texts) == 2 * len(gpu["correctness"].ADDITIVE)


def place(gpu):
    return gpu["part"].Place(torch.device("cpu"), True)


def test_a_row_that_fails_leaves_the_others_and_is_run_again(gpu, tmp_path):
    Part, Skipped = gpu["part"].Part, gpu["part"].Skipped
    path, calls = tmp_path / "rows.json", []

    def fails():
        calls.append("fails")
        raise ArithmeticError("no luck")

    def lacks():
        raise Skipped("no such package")

    def works():
        calls.append("works")
        return {"x": 1}

    for _ in range(2):
        part = Part(path, place(gpu), 60.0)
        for name, run in (("a", fails), ("b", lacks), ("c", works), ("d", lambda: {"ok": False, "x": 2})):
            part.row(name, run)
    assert calls == ["fails", "works", "fails"]
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert rows["a"]["error"] == "ArithmeticError: no luck"
    assert "in fails" in rows["a"]["traceback"]
    assert rows["b"]["skipped"] == "no such package"
    assert [gpu["part"].is_wrong(rows[name]) for name in "abcd"] == [True, False, False, True]
    again = Part(path, place(gpu), 60.0, again=True)
    again.row("c", works)
    assert calls[-2:] == ["fails", "works"]
    assert list(again.rows) == ["c"]


def test_a_row_for_which_no_time_is_left_waits_for_the_next_run(gpu, tmp_path):
    part = gpu["part"].Part(tmp_path / "rows.json", place(gpu), 5.0)
    part.row("long", lambda: {"x": 1}, needs=60.0)
    assert part.rows["long"]["skipped"] == "the part's time is over"
    assert not gpu["part"].is_done(part.rows["long"])


def test_a_part_that_breaks_is_told_and_the_others_run(gpu, tmp_path, monkeypatch, capsys):
    from gpu import decompositions, kernels

    def breaks(part):
        part.row("first", lambda: {"x": 1})
        raise MemoryError("no more")

    monkeypatch.setattr(kernels, "measure", breaks)
    monkeypatch.setattr(decompositions, "measure", lambda part: part.row("one", lambda: {"s": 1.0}))
    assert gpu["run"].main(["--tiny", "--out", str(tmp_path), "--only", "kernels", "decompositions"]) == 1
    said = capsys.readouterr().out
    assert "WRONG the part: MemoryError: no more" in said
    assert "decompositions: 1 of 1 rows, 0 wrong" in said


def test_a_process_that_dies_is_an_error_of_its_part(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu["run"].subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, -11))
    gpu["run"].start("steps", tmp_path, 30.0, False)
    path = gpu["run"].path_of("steps", tmp_path, False)
    assert (
        json.loads(path.read_text(encoding="utf-8"))["rows"]["the part"]["error"] == "its process ended with code -11"
    )
    assert gpu["run"].told({"steps": gpu["part"].read(path)}, tmp_path) == 1

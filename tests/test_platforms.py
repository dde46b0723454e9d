"""What other systems do otherwise, imitated: no /proc, other encodings and line ends, open files, names of folders."""

import ast
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import spectune
from spectune import home, storage
from spectune.cli import app, main
from spectune.compare.meter import Peak
from spectune.compare.trial import Trial
from spectune.errors import SpectuneError
from spectune.pages import about
from spectune.training.config import load_config
from spectune.training.data.records import read
from spectune.training.tasks.sft import Sft
from spectune.transformer2.prompts import read_prompts
from training.folder import save_folder

ROOT = Path(__file__).parents[1]
SOURCES = [path for part in ("src", "benchmarks", "examples", ".ci") for path in sorted((ROOT / part).rglob("*.py"))]
AHOY = "ahoy é 模型 $1_$"


def calls(tree):
    """Yield the name of each function or method that a module calls, with the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def reads_bytes(name, call):
    """Whether a call opens a file that has no encoding, or none at all."""
    mode = [
        a for a in (*call.args, *(k.value for k in call.keywords if k.arg == "mode")) if isinstance(a, ast.Constant)
    ]
    owner = getattr(getattr(call.func, "value", None), "id", "")
    return name == "open" and (owner in ("os", "Library", "webbrowser") or any("b" in str(m.value) for m in mode))


def test_every_text_that_is_read_or_written_names_its_encoding():
    silent = []
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            given = {keyword.arg for keyword in call.keywords}
            if name == "read_text" and isinstance(call.func, ast.Name):  # spectune.reading's own, which is UTF-8
                continue
            if name in ("open", "read_text", "write_text") and not reads_bytes(name, call) and "encoding" not in given:
                silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not silent


def test_every_file_is_python_of_the_oldest_version():
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_nothing_depends_on_how_processes_start():
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            assert name != "fork", path
            if name == "get_context":
                assert [a.value for a in call.args] != ["fork"], path
            if name in ("Pool", "ProcessPoolExecutor", "Process"):
                owner = getattr(getattr(call.func, "value", None), "id", "")
                assert owner not in ("multiprocessing", "mp"), f"{path}: of the system's own way"


@pytest.fixture
def without_proc(monkeypatch):
    """A system that has no /proc, as every one but Linux."""
    open_, stat = Path.open, Path.stat

    def missing(path):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: missing(path) or open_(path, *args, **options))
    monkeypatch.setattr(Path, "stat", lambda path, **options: missing(path) or stat(path, **options))


def test_without_proc_the_processor_is_named_otherwise_and_peaks_are_not_told(without_proc):
    from spectune.speed import dense

    assert isinstance(dense._processor(), str)
    dense._mkl_is_slow.cache_clear()
    assert dense._mkl_is_slow() in (True, False)
    dense._mkl_is_slow.cache_clear()
    assert about.describe()["processor"] is not None
    assert Peak().bytes() is None


def data(path, ends="\n", begins=b""):
    lines = [json.dumps({"prompt": f"say {w}", "completion": f"ahoy {w}"}) for w in ("one", "two", "three", "four") * 2]
    path.write_bytes(begins + ends.join([*lines, ""]).encode())
    return path


@pytest.mark.parametrize("begins", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_files_written_on_other_systems_are_read_alike(tmp_path, ends, begins):
    task = Sft(load_config(None, ["model=m", "data=d", "output=o"]))
    assert read(data(tmp_path / "a.jsonl", ends, begins), task) == read(data(tmp_path / "b.jsonl"), task)
    (tmp_path / "run.yaml").write_bytes(begins + ends.join(["model: m é", "data: d", "output: o", ""]).encode())
    assert load_config(tmp_path / "run.yaml", []).model == "m é"
    (tmp_path / "prompts.txt").write_bytes(begins + ends.join(["say é", "say two", ""]).encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["say é", "say two"]
    (tmp_path / "prompts.csv").write_bytes(begins + ends.join(["prompt,completion", "say é,one", ""]).encode())
    assert read_prompts(tmp_path / "prompts.csv") == ["say é"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space and letters beyond ASCII, with a model and an adapter that was trained there."""
    folder = tmp_path_factory.mktemp("a folder") / AHOY
    model = save_folder(folder / "the model")
    settings = [
        f"model={model}",
        f"data={data(folder / 'the data.jsonl')}",
        "dtype=fp32",
        "device=cpu",
        "held_out=0.25",
    ]
    done = CliRunner().invoke(app, ["train", *settings, f"output={folder / 'out é'}", "max_steps=2", "save_steps=1"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return folder


def test_folders_with_spaces_and_letters_beyond_ascii(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path / AHOY))
    out, model = str(place / "out é"), str(place / "the model")

    def run(*arguments):
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.stdout

    again = [f"model={model}", f"data={place / 'the data.jsonl'}", "dtype=fp32", "device=cpu", "held_out=0.25"]
    run("train", *again, f"output={out}", "max_steps=3", "save_steps=1", "resume=true")
    assert json.loads(run("generate", model, "say one", "-a", out, "--max-new-tokens", "2", "--json"))[0]["tokens"]
    run("compose", str(place / "the sum"), f"{out}:0.5", f"{out}:0.5")
    run("export", out, str(place / "merged é"), "--format", "merged")
    run("library", "add", str(place / "library é"), out, "--name", "one")
    assert len(json.loads(run("cache", "ls", "--json"))) == 14


def test_what_a_console_cannot_show_is_written_out(place):
    script = "import sys; from spectune.cli import main; import typer; sys.argv = ['spectune', 'cache', 'ls']; main()"
    folder = place / AHOY
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "SPECTUNE_CACHE": str(folder), "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u6a21" in done.stdout + done.stderr


def test_names_of_trials_are_names_on_every_system():
    methods = ["lora", "dora:inner=pissa,rank=16", "svft:pattern=banded,width=8", "lora:alpha=1e-1", "full", "base"]
    trials = [Trial(m, lr, s, "final") for m in methods for lr in (None, 1e-3, 1e-2) for s in (0, 1)]
    names = [trial.name for trial in trials]
    assert len({name.casefold() for name in names}) == len(names)
    assert not any(set(name) & set('<>:"/\\|?*') or name.endswith((".", " ")) for name in names)


def test_a_file_that_is_open_elsewhere_leaves_the_old_adapter_whole(tmp_path, monkeypatch, capsys):
    model = spectune.adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)), "svf")
    adapter = spectune.extract(model)
    adapter.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def locked(source, target):
        raise PermissionError(13, "The process cannot access the file", str(source), None, str(target))

    monkeypatch.setattr(storage.os, "replace", locked)
    with pytest.raises(PermissionError):
        (2.0 * adapter).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(sys, "argv", ["spectune", "compose", str(tmp_path / "sum"), f"{tmp_path}:2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "sum cannot be written (The process cannot access the file" in said
    assert "another program may have it open" in said


def test_a_home_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SPECTUNE_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.delenv("SPECTUNE_CACHE", raising=False)
    spectune.spectral.cache._warned.clear()
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.randn(2, 4)
    plain = model(x)
    with pytest.warns(RuntimeWarning, match="not cached: .* cannot be written .*set SPECTUNE_CACHE to another"):
        spectune.adapt(model, "svf")
    assert torch.equal(model.eval()(x), plain)
    save_folder(tmp_path / "model")
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "-m", "svf", "--length", "8", "--json"])
    assert done.exit_code == 0, done.output + repr(done.exception)


def test_without_a_home_the_remedy_is_told(monkeypatch):
    for name in ("SPECTUNE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(SpectuneError, match=r"no home directory .*: set SPECTUNE_HOME to a folder"):
        home.cache_dir()


def _adapted(weight, ready):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model[0].weight.data = torch.tensor(weight)
    spectune.adapt(model, "svf")
    ready.put(sorted(name for name, p in model.named_parameters() if p.requires_grad))


def test_a_process_that_is_spawned_adapts_as_one_that_is_forked():
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=_adapted, args=(torch.randn(3, 4).tolist(), ready))
    process.start()
    assert ready.get(timeout=600) == ["0.adapters.default.0.z"]
    process.join()
    assert process.exitcode == 0

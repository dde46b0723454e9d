"""The commands that write, as operations to be killed: what was there, what is written, and how it is read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import spectune
from compare.tiny_bench import write_data, write_encoder
from spectune import Adapter, SpectuneError
from spectune.cli import app
from spectune.storage import collect_temporaries
from spectune.training.trainer.checkpoint_files import check_files, checkpoints
from training.folder import NUMBERS, save_folder


def run(*arguments: object) -> None:
    """Run a command in this process and keep what it says to itself."""
    os.environ["SPECTUNE_CACHE"] = "off"
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        app([str(argument) for argument in arguments], standalone_mode=False)


@cache
def inputs() -> Path:
    """Return a folder of what the commands read: two models, data, and adapters of one of the models."""
    place = Path(tempfile.mkdtemp(prefix="spectune-inputs-"))
    save_folder(place / "base")
    (place / "encoder").mkdir()
    write_encoder(place / "encoder")
    write_data(place / "texts.jsonl")
    pairs = [{"prompt": f"what is {n}", "completion": f"ahoy {n}"} for n in NUMBERS]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name, method in (("svf", "svf"), ("lora", "lora:rank=2"), ("xs", "lora_xs:rank=2")):
        model, _ = spectune.load_base(place / "base", "fp32")
        spectune.adapt(model, method)
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
        adapter = spectune.extract(model)
        adapter.save(place / name)
        if name == "lora":
            adapter.export(place / "peft")
    return place


def values(found: Adapter) -> str:
    """Return what tells one adapter from another."""
    trained = [t for layer in found.layers.values() for term in layer.terms for t in term.trained.values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in trained)).hexdigest()[:12]


def read_adapter(place: Path) -> str:
    """Return which adapter is there."""
    try:
        return values(Adapter.load(place / "out"))
    except SpectuneError:
        collect_temporaries(place / "out")
        assert not (place / "out").exists() or not list((place / "out").iterdir()), "half an adapter"
        return "nothing"


def read_merged(place: Path) -> str:
    """Return which merged model is there."""
    collect_temporaries(place)
    if not (place / "out").exists():
        return "nothing"
    files = sorted(p for p in (place / "out").iterdir())
    load_file(place / "out" / "model.safetensors")
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:12]


def train(place: Path, *more: str) -> None:
    settings = ["max_steps=4", "save_steps=2", "batch_size=4", "dtype=fp32", "device=cpu", "held_out=0", "method=svf"]
    source = inputs()
    run(
        "train",
        f"model={source / 'base'}",
        f"data={source / 'pairs.jsonl'}",
        f"output={place / 'out'}",
        *settings,
        *more,
    )


def read_train(place: Path) -> str:
    """Check what is visible of a run, go on with it, and return what came of it."""
    out = place / "out"
    for path in checkpoints(out):
        check_files(path)
        Adapter.load(path)
    if (out / "adapter_config.json").exists():
        Adapter.load(out)
    for name in ("run.json", "spectune.json"):
        if (out / name).exists():
            json.loads((out / name).read_text())
    try:
        train(place, "resume=true")
    except SpectuneError:
        train(place, "overwrite=true")
    left = [path.name for path in out.glob("*.partial")]
    assert not left, f"a run that went on left {left}"
    return values(Adapter.load(out))


def compare(place: Path) -> None:
    source = inputs()
    named = [
        f"model={source / 'encoder'}",
        f"data={source / 'texts.jsonl'}",
        "task=classify",
        f"output={place / 'out'}",
    ]
    run(
        "compare",
        *named,
        "methods=[lora]",
        "max_steps=2",
        "batch_size=8",
        "dtype=fp32",
        "seeds=1",
        "lrs=1",
        "general=null",
    )


def read_compare(place: Path) -> str:
    """Check what is visible of a comparison, go on with it, and return its numbers."""
    for path in (place / "out").rglob("*.json"):
        json.loads(path.read_text())
    for path in (place / "out").rglob("*.html"):
        assert path.read_text().rstrip().endswith("</html>")
    compare(place)
    collect_temporaries(place / "out")
    collect_temporaries(place / "out" / "trials")
    found = json.loads((place / "out" / "report.json").read_text())
    return json.dumps([(row["method"], row["metric"]) for row in found["methods"]])


def spectrum(place: Path) -> None:
    run("spectrum", inputs() / "base", "--out", place / "out", "--adapter", inputs() / "svf")


def read_spectrum(place: Path) -> str:
    """Check what is visible of a report, go on with it, and return its numbers."""
    for path in (place / "out").glob("*.json"):
        json.loads(path.read_text())
    for path in (place / "out").glob("*.html"):
        assert path.read_text().rstrip().endswith("</html>")
    spectrum(place)
    collect_temporaries(place / "out")
    found = json.loads((place / "out" / "spectrum.json").read_text())
    return json.dumps([found["kinds"], found["adapter"].get("summary")])


def library(place: Path, *names: str) -> None:
    for name in names:
        run("library", "add", place / "lib", inputs() / name)


def read_library(place: Path) -> str:
    from spectune import Library

    if not (place / "lib").exists():
        return ""
    found = Library(place / "lib")
    text = " ".join(f"{name}={values(found.adapter(name))}" for name in found.names)
    for name in [name for name in ("svf", "xs") if name not in found]:  # what was begun does not stand in its way
        library(place, name)
    for path in (place / "lib").rglob(".*.tmp"):
        collect_temporaries(path.parent)
    return text


def mix(place: Path) -> None:
    source = inputs()
    shots = ["--iterations", 1, "--population", 2, "--elites", 1, "--overwrite", "--device", "cpu", "--dtype", "fp32"]
    run("library", "mix", place / "lib", source / "pairs.jsonl", place / "out", *shots)


def with_library(place: Path) -> None:
    library(place, "svf", "xs")


def old(place: Path) -> None:
    Adapter.load(inputs() / "xs").save(place / "out")


def old_merged(place: Path) -> None:
    export(place, "xs", "merged")


def export(place: Path, name: str, kind: str) -> None:
    loss = [] if kind == "merged" else ["--allow-loss"]
    run("export", inputs() / name, place / "out", "--format", kind, "--overwrite", *loss)


def init(place: Path) -> None:
    data = inputs() / "pairs.jsonl"
    run("init", data, "-m", inputs() / "base", "--out", place / "run.yaml", "--overwrite")


def read_init(place: Path) -> str:
    collect_temporaries(place)
    path = place / "run.yaml"
    return path.read_text().replace(str(place), "") if path.exists() else "nothing"


def nothing(place: Path) -> None:
    """Leave an empty folder."""


Operation = tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[Path], str]]
COMMANDS: dict[str, Operation] = {
    "train": (nothing, train, read_train),
    "export, peft": (old, lambda p: export(p, "lora", "peft"), read_adapter),
    "export, merged": (old_merged, lambda p: export(p, "lora", "merged"), read_merged),
    "export, merged, anew": (nothing, lambda p: export(p, "lora", "merged"), read_merged),
    "import": (old, lambda p: run("import", inputs() / "peft", p / "out", "--overwrite"), read_adapter),
    "import, anew": (nothing, lambda p: run("import", inputs() / "peft", p / "out"), read_adapter),
    "compose": (
        old,
        lambda p: run("compose", p / "out", f"{inputs() / 'svf'}:0.5", f"{inputs() / 'lora'}:0.3", "--overwrite"),
        read_adapter,
    ),
    "library add": (lambda p: library(p, "svf"), lambda p: library(p, "xs"), read_library),
    "library rm": (with_library, lambda p: run("library", "rm", p / "lib", "xs"), read_library),
    "library mix": (lambda p: (with_library(p), old(p)), mix, read_adapter),
    "compare": (nothing, compare, read_compare),
    "spectrum": (nothing, spectrum, read_spectrum),
    "init": (nothing, init, read_init),
}

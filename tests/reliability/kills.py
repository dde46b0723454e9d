"""Kills at system calls, and calls that fail: `cd tests && python -m reliability.kills 200`.

Every operation that writes is run in a child of its own that kills itself with SIGKILL just before, or halfway into, a
call that changes the file system; every second kill at least is in the middle of a write.  Afterwards what is visible
must be as it was, or as it was to be, a run must resume to the weights of the undisturbed one, and no temporary file
may be left once it has been opened.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_bytes
from transformers import modeling_utils

import forked
import spectune
from reliability.commands import COMMANDS, Operation
from spectune import Adapter, Library, SpectuneError
from spectune.compare.trial import Results, Trial
from spectune.spectral import Request, cache, decompose_many
from spectune.spectrum.ledger import Ledger
from spectune.storage import collect_temporaries, exchange, publish, temporary_beside, write_atomically

CALLS = ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync", "link", "utime", "truncate")


def adapter(method: str, seed: int) -> Adapter:
    """Return an adapter with values of its own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)).eval()
    spectune.adapt(model, method)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    return spectune.extract(model)


OLD, NEW = adapter("svf", 1), adapter("lora_xs:rank=2", 2)
TRIAL = Trial("svf", 1e-3, 0, "final")
W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))


def values(found: Adapter) -> str:
    """Return what tells one adapter from another."""
    trained = (tensor for layer in found.layers.values() for term in layer.terms for tensor in term.trained.values())
    return f"{[round(float(tensor.double().sum()), 4) for tensor in trained]}"


def folder_of(text: str) -> Callable[[Path], None]:
    """Return what writes a folder, as a merged model is written."""

    def write(place: Path) -> None:
        with temporary_beside(place / "out", folder=True) as folder:
            for name in "ab":
                (folder / name).write_text(text)
            publish(folder, place / "out")

    return write


def read_folder(place: Path) -> str:
    found = {path.read_text() for path in (place / "out").iterdir()} if (place / "out").exists() else {"nothing"}
    collect_temporaries(place)
    return "+".join(sorted(found))


def library(place: Path, name: str, which: Adapter) -> None:
    Library(place / "lib").add(name, which, prompts=["a prompt"])


def read_library(place: Path) -> str:
    found = Library(place / "lib")
    if "new" not in found:  # what was begun under a name does not stand in its way
        text = "+".join(values(found.adapter(name)) for name in found.names)
        library(place, "new", NEW)
        found = Library(place / "lib")
        found.remove("new")
        return text
    return "+".join(values(found.adapter(name)) + found.prompts(name)[0] for name in found.names)


def results(place: Path, value: float) -> None:
    Results(place, "x").put(TRIAL, {"error": None, "test": value})


def read_results(place: Path) -> str:
    found = Results(place, "x").get(TRIAL)
    collect_temporaries(place)
    return "nothing" if found is None else str(found["test"])


def ledger(place: Path, names: str) -> None:
    book = Ledger(place / "ledger.jsonl", {"format": 1})
    for name in names:
        book.add(name, {"values": [ord(name)] * 9})


def read_ledger(place: Path) -> str:
    return "".join(sorted(Ledger(place / "ledger.jsonl", {"format": 1}).done))


def cached(place: Path) -> None:
    decompose_many({"w": W}, Request("full"), cache=place / "cache")


def read_cached(place: Path) -> str:
    found = decompose_many({"w": W}, Request("full"), cache=place / "cache")["w"]
    assert float((found.U * found.S @ found.Vh - W).norm()) < 1e-4
    assert cache.verify(place / "cache") == []
    cache.prune(folder=place / "cache")
    return "sound"


def text_file(place: Path, text: str) -> None:
    write_atomically(place / "file", lambda to: to.write_text(text))


def read_text_file(place: Path) -> str:
    collect_temporaries(place)
    return (place / "file").read_text()


CALLS_ALONE: dict[str, Operation] = {  # what was there, what is written, and how it is read
    "save": (lambda p: OLD.save(p / "a"), lambda p: NEW.save(p / "a"), lambda p: values(Adapter.load(p / "a"))),
    "save anew": (lambda p: None, lambda p: NEW.save(p / "a"), lambda p: _if_there(p / "a")),
    "export": (
        lambda p: OLD.export(p / "a"),
        lambda p: (2 * OLD).export(p / "a"),
        lambda p: values(Adapter.load(p / "a")),
    ),
    "merged model": (folder_of("old"), folder_of("new"), read_folder),
    "library add": (lambda p: library(p, "old", OLD), lambda p: library(p, "new", NEW), read_library),
    "compare": (lambda p: results(p, 1.0), lambda p: results(p, 2.0), read_results),
    "spectrum": (lambda p: ledger(p, "ab"), lambda p: ledger(p, "c"), read_ledger),
    "cache": (lambda p: None, cached, read_cached),
    "any text": (lambda p: text_file(p, "old"), lambda p: text_file(p, "new"), read_text_file),
}
OPERATIONS = {**CALLS_ALONE, **{f"spectune {name}": operation for name, operation in COMMANDS.items()}}


def _if_there(folder: Path) -> str:
    try:
        return values(Adapter.load(folder))
    except SpectuneError:
        collect_temporaries(folder)
        return "nothing"


@contextlib.contextmanager
def interfering(
    dies_at: int | None, act: Callable[[], Any], always: Callable[[], Any] = lambda: None
) -> Iterator[list[str]]:
    """Within the context, count calls that change the file system, and act at one of them, or always."""
    calls: list[str] = []

    def count(name: str) -> None:
        calls.append(name)
        always()
        if len(calls) == dies_at:
            act()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count(name)
            return real(*args, **kwargs)

        return call

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:  # a first half, so that a kill leaves one
            half = len(memoryview(data).cast("B")) // 2
            super().write(memoryview(data).cast("B")[:half])
            count("write")
            super().write(memoryview(data).cast("B")[half:])
            return len(memoryview(data).cast("B"))

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not any(letter in mode for letter in "wax+") or not isinstance(file, (str, os.PathLike)):
            return real_open(file, mode, *args, **kwargs)
        count("open")
        raw = io.BufferedRandom if "+" in mode else io.BufferedWriter
        binary = raw(Counted(file, mode.replace("b", "").replace("t", "")))  # type: ignore[arg-type]
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8", newline="")

    def saved(held: Any, place: Any, *args: Any, **kwargs: Any) -> None:  # by PyTorch's own C++, if not by Python
        if not isinstance(place, (str, os.PathLike)):
            real_save(held, place, *args, **kwargs)
            return
        buffer = io.BytesIO()
        real_save(held, buffer, *args, **kwargs)
        with opened(place, "wb") as file:
            file.write(buffer.getvalue())

    def saved_tensors(tensors: Any, place: Any, metadata: Any = None) -> None:  # by safetensors' own Rust
        with opened(place, "wb") as file:
            file.write(tensors_bytes(tensors, metadata))

    real_save, real_save_file = torch.save, modeling_utils.safe_save_file
    torch.save, modeling_utils.safe_save_file = saved, saved_tensors
    real_open, kept = builtins.open, {name: getattr(os, name) for name in CALLS}
    for name, real in kept.items():
        setattr(os, name, counted(name, real))
    builtins.open = io.open = opened  # type: ignore[assignment]
    changed = spectune.storage.exchange
    spectune.storage.exchange = counted("exchange", exchange)
    try:
        yield calls
    finally:
        torch.save, modeling_utils.safe_save_file = real_save, real_save_file
        builtins.open = io.open = real_open
        spectune.storage.exchange = changed
        for name, real in kept.items():
            setattr(os, name, real)


def in_child(place: Path, operate: Callable[[Path], Any], dies_at: int | None) -> tuple[int, list[str]]:
    """Run an operation in a child and return how it ended, and the names of the calls that it made."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with interfering(dies_at, lambda: os.kill(os.getpid(), signal.SIGKILL)) as calls:
                operate(place)
            os.write(send, " ".join(calls).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.split()


def _state(name: str, root: Path, written: bool) -> str:
    """Return what an operation's place says before it, or after."""
    before, write, read = OPERATIONS[name]
    place = Path(tempfile.mkdtemp(dir=root))
    before(place)
    if written:
        write(place)
    return read(place)


def kills(count: int, seed: int = 0, names: Iterable[str] = OPERATIONS) -> dict[str, Counter[str]]:
    """Kill each operation at as many of its calls, every second time in a write, and return at which calls it was."""
    torch.set_num_threads(1)
    names = list(names)
    draw, done = random.Random(seed), {name: Counter[str]() for name in names}
    each = -(-count // len(names))
    for name in names:
        before, write, read = OPERATIONS[name]
        with tempfile.TemporaryDirectory() as root:
            old = _state(name, Path(root), False)
            for attempt in ("first", "whole"):  # the first may fill caches, by calls that the others do not make
                whole = Path(root) / attempt
                whole.mkdir()
                before(whole)
                code, calls = in_child(whole, write, None)
                assert code == 0, f"{name} fails"
            new = read(whole)
            for dies_at in _moments(calls, each, draw):
                place = Path(root) / f"{name}-{done[name].total()}".replace(" ", "-").replace(",", "")
                place.mkdir()
                before(place)
                code, _ = in_child(place, write, dies_at)
                where = f"{name}, killed at call {dies_at} of {len(calls)} ({calls[dies_at - 1]})"
                assert code == -signal.SIGKILL, f"{where}: ended with {code}"
                found = read(place)
                assert found in (old, new), f"{where}: {found}, not {old} or {new}"
                left = [path for path in place.rglob(".*.tmp") if "lock" not in path.name]
                assert not left, f"{where}, left {left}"
                done[name][calls[dies_at - 1]] += 1
                shutil.rmtree(place)
    return done


def _moments(calls: list[str], count: int, draw: random.Random) -> list[int]:
    """Return at which calls to die: writes and others in turn, each once before any of them twice."""
    writes = [i for i, call in enumerate(calls, start=1) if call == "write"]
    others = [i for i, call in enumerate(calls, start=1) if call != "write"]
    found: list[int] = []
    for kind in (writes or others, others):
        draw.shuffle(kind)
    while len(found) < count:
        i = len(found) // 2
        found.append((writes or others)[i % len(writes or others)])
        found.append(others[i % len(others)])
    return found[:count]


def full_disks(most: int, names: Iterable[str] | None = None) -> int:
    """Let each operation fail for want of space at its calls in turn; what is there is old or new, and nothing else."""
    failures = 0

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in names or OPERATIONS:
        before, write, read = OPERATIONS[name]
        with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that decompositions are not cached
            known = {_state(name, Path(root), written) for written in (False, True)}
            for fails_at in range(1, most + 1):
                place = Path(tempfile.mkdtemp(dir=root))
                before(place)
                with interfering(fails_at, full) as calls, contextlib.suppress(SpectuneError, OSError):
                    write(place)
                if len(calls) < fails_at:
                    break
                found = read(place)
                failures += 1
                assert found in known, f"{name} without space at call {fails_at}: {found}, not one of {known}"
    return failures


def file_size_limit() -> None:
    """Save under RLIMIT_FSIZE, which a child of its own has: one sentence or error, and the old adapter stays."""
    with tempfile.TemporaryDirectory() as root:
        OLD.save(Path(root) / "a")

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
            try:
                NEW.save(Path(root) / "a")
            except OSError:
                os._exit(7)

        assert forked.ended(limited) == 7
        assert values(Adapter.load(Path(root) / "a")) == values(OLD)
        assert not list((Path(root) / "a").glob(".*"))


def main() -> None:
    """Kill as often as the argument says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(OPERATIONS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    at = Counter[str]()
    for name in given.only:
        (times,) = kills(-(-given.count // len(given.only)), given.seed, [name]).values()
        at += times
        print(f"{name}: {dict(times)}", flush=True)
    print(f"{at.total()} kills of {len(given.only)} operations, at {dict(at)}")


if __name__ == "__main__":
    main()

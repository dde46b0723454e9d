"""Kills at system calls, full disks and hostile documents: `make reliability`, or `python tests/reliability.py 50 100`.

Every operation that writes is run in a child of its own that kills itself with SIGKILL just before, or halfway into, a
call that changes the file system.  Afterwards what is visible must be as it was, or as it was to be, and no temporary
file may be left once it has been opened.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import spectune
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


Operation = tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[Path], str]]
OPERATIONS: dict[str, Operation] = {  # what was there, what is written, and how it is read
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


def _if_there(folder: Path) -> str:
    try:
        return values(Adapter.load(folder))
    except SpectuneError:
        collect_temporaries(folder)
        return "nothing"


@contextlib.contextmanager
def interfering(dies_at: int | None, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Within the context, count calls that change the file system, and act at one of them."""
    calls: list[str] = []

    def count(name: str) -> None:
        calls.append(name)
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

    real_open, kept = builtins.open, {name: getattr(os, name) for name in CALLS}
    for name, real in kept.items():
        setattr(os, name, counted(name, real))
    builtins.open = io.open = opened  # type: ignore[assignment]
    changed = spectune.storage.exchange
    spectune.storage.exchange = counted("exchange", exchange)
    try:
        yield calls
    finally:
        builtins.open = io.open = real_open
        spectune.storage.exchange = changed
        for name, real in kept.items():
            setattr(os, name, real)


def in_child(place: Path, operate: Callable[[Path], Any], dies_at: int | None) -> tuple[int, int]:
    """Run an operation in a child and return how it ended, and the calls that it made."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with interfering(dies_at, lambda: os.kill(os.getpid(), signal.SIGKILL)) as calls:
                operate(place)
            os.write(send, str(len(calls)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(told or 0)


def _state(name: str, root: Path, written: bool) -> str:
    """Return what an operation's place says before it, or after."""
    before, write, read = OPERATIONS[name]
    place = Path(tempfile.mkdtemp(dir=root))
    before(place)
    if written:
        write(place)
    return read(place)


def kills(count: int, seed: int = 0) -> dict[str, int]:
    """Kill each operation at as many of its calls, in turn and then by chance; return how often each was killed."""
    torch.set_num_threads(1)
    draw, done = random.Random(seed), dict.fromkeys(OPERATIONS, 0)
    each = -(-count // len(OPERATIONS))
    for name, (before, write, read) in OPERATIONS.items():
        with tempfile.TemporaryDirectory() as root:
            old = _state(name, Path(root), False)
            whole = Path(root) / "whole"
            whole.mkdir()
            before(whole)
            code, calls = in_child(whole, write, None)
            assert code == 0, f"{name} fails"
            new = read(whole)
            order = list(range(1, calls + 1))
            draw.shuffle(order)
            for dies_at in (order * (each // calls + 1))[:each]:
                place = Path(root) / f"{name}-{done[name]}".replace(" ", "-")
                place.mkdir()
                before(place)
                code, _ = in_child(place, write, dies_at)
                assert code == -signal.SIGKILL, f"{name} was not killed at call {dies_at} of {calls}: {code}"
                found = read(place)
                assert found in (old, new), f"{name}, killed at call {dies_at} of {calls}: {found}, not {old} or {new}"
                left = [path for path in place.rglob(".*.tmp") if "lock" not in path.name]
                assert not left, f"{name}, killed at call {dies_at} of {calls}, left {left}"
                done[name] += 1
                shutil.rmtree(place)
    return done


def full_disks(most: int) -> int:
    """Let each operation fail for want of space at its calls in turn; what is there is old or new, and nothing else."""
    failures = 0

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, (before, write, read) in OPERATIONS.items():
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
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
            try:
                NEW.save(Path(root) / "a")
            except OSError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert values(Adapter.load(Path(root) / "a")) == values(OLD)
        assert not list((Path(root) / "a").glob(".*"))


def hostile(count: int, seed: int = 0) -> dict[str, int]:
    """Change bytes of sound adapters, of a library's index and a configuration: an answer or a SpectuneError."""
    draw, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    peft = {"base_model.model.a.lora_A.weight": torch.ones(1, 2), "base_model.model.a.lora_B.weight": torch.ones(2, 1)}
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        sound = [OLD.save(place / "ours"), adapter("lora:rank=2", 3).save(place / "lora")]
        library(place, "one", OLD)
        (place / "theirs").mkdir()
        save_file(peft, place / "theirs" / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "rank_pattern": {"a": 1},
            "base_model_name_or_path": "b",
        }
        (place / "theirs" / "adapter_config.json").write_text(json.dumps(config))
        files = [path for folder in (*sound, place / "theirs") for path in folder.iterdir()] + [
            place / "lib/library.json"
        ]
        kept = {path: path.read_bytes() for path in files}
        for _ in range(count):
            path = draw.choice(files)
            path.write_bytes(mutated(kept[path], draw))
            began = time.perf_counter()
            try:
                Library(path.parent) if path.name == "library.json" else Adapter.load(path.parent)
                outcomes["read"] += 1
            except SpectuneError:
                outcomes["refused"] += 1
            assert time.perf_counter() - began < 60  # of a bound; on an idle machine it is milliseconds
            path.write_bytes(kept[path])
    return outcomes


TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"9" * 400,
    b"[" * 300,
    b'"\\ud800"',
    b"NaN",
    b'"(a+)+"',
]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with a few changes: bits, cuts, repeats, and values of JSON replaced by others."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[max(0, at - draw.randrange(40)) :]
        elif kind == 3:
            data = data[:at] + draw.choice(TOKENS) + data[at:]
        else:
            start = data.find(b":", at)
            ends = [end for end in (data.find(b",", start), data.find(b"}", start)) if end > start >= 0]
            data = data[: start + 1] + draw.choice(TOKENS) + data[min(ends) :] if ends else data
    return data


def main() -> None:
    """Run all, as often as the arguments say: kills, and hostile documents."""
    count, cases = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (200, 100_000)
    done = kills(count)
    print(f"{sum(done.values())} kills: {done}")
    print(f"{full_disks(40)} calls without space")
    file_size_limit()
    print(f"{cases} hostile documents: {hostile(cases)}")


if __name__ == "__main__":
    main()

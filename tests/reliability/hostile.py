"""Hostile and broken inputs for every reader: an answer or one SpectuneError, within a second of CPU and a gigabyte.

A case takes sound files of one kind, changes some of them (bytes, values of JSON and YAML, names, shapes, dtypes and
values of tensors, sizes, files for folders), seals them again by their own checksums where it can, so that what lies
behind the checksums is reached too, and has them read and used.  Which changes is drawn from a `random.Random`, so that
plain random numbers, hypothesis and a coverage-guided fuzzer all drive the same cases:

    cd tests && python -m reliability.hostile 100000             # random and by hypothesis, half each
    cd tests && python -m reliability.hostile 20000 --first 40000   # a part, to be resumed: seeds 40,000 to 59,999
    cd tests && python -m reliability.hostile --atheris 100000   # where atheris is installed
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_bytes
from safetensors.torch import save_file

from reliability import samples
from spectune import Adapter, Library, SpectuneError
from spectune.adapters import folder as adapter_folder
from spectune.adapters.destination import check_destination
from spectune.bases.loading import load_base
from spectune.bases.runs import named
from spectune.compare.config import CompareConfig, check_folder
from spectune.compare.trial import Results, Trial
from spectune.methods import from_fields, parse
from spectune.model.patterns import by_pattern, in_blocks, matching
from spectune.patterns import matches_end
from spectune.planning.machine import this_machine
from spectune.serving import protocol
from spectune.spectral import Request, cache, decompose_many
from spectune.spectrum.checkpoint import open_checkpoint
from spectune.spectrum.ledger import Ledger
from spectune.training.config import TrainConfig, load_config
from spectune.training.data.records import read as read_data
from spectune.training.progress import _lines as log_lines
from spectune.training.record import changed, read_run
from spectune.training.tasks import make_task
from spectune.training.trainer.checkpoint_files import check_files, checkpoints
from spectune.transformer2.classifier import Classifier
from spectune.transformer2.prompts import read_prompts

SECONDS, MEGABYTES = 5.0, 1024  # of a case


class Reader(NamedTuple):
    """What is read.

    Args:
        make: writes sound files to a folder.
        read: reads them, and uses what was read.
        often: how many cases it gets, beside the others.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    often: int = 1


# -- readers


def use(place: Path) -> Any:
    """Read an adapter and do with it what needs no base."""
    adapter = Adapter.load(place)
    sums = 0.5 * adapter - adapter
    for name in adapter.layers:
        if adapter.self_contained(name) and adapter.layers[name].shape[0] * adapter.layers[name].shape[1] < 1 << 20:
            adapter.delta(name)
            sums.delta(name)
    adapter.labels, adapter.parameter_count(), repr(adapter)
    return adapter


def read_library(place: Path) -> Any:
    library = Library.open(place)
    sketches = library.sketches()
    for name in library.names:
        library.adapter(name), library.prompts(name), library.record(name)
    if (place / "classifier").exists():
        Classifier.load(library)
    library.add("more", samples.adapter("lora:rank=1", 4), prompts=["x"])
    return sketches


def read_checkpoint(place: Path) -> Any:
    for matrix in open_checkpoint(str(place)).matrices:
        if matrix.shape[0] * matrix.shape[1] < 1 << 20:
            matrix.read()


def read_records(name: str, task: str = "sft") -> Callable[[Path], Any]:
    def read(place: Path) -> Any:
        config = load_config(None, ["model=m", "output=o", f"data={place / name}", f"task={task}"])
        return read_data(place / name, make_task(config))

    return read


def read_run_folder(place: Path) -> Any:
    found = read_run(place)
    changed(found, load_config(None, ["model=m", "output=o", "data=d"]))
    with contextlib.suppress(FileNotFoundError):
        log_lines(place / "log.jsonl", 10)
    return named(str(place))


def read_training(place: Path) -> Any:
    for path in checkpoints(place):
        check_files(path)
        Adapter.load(path)


def read_decompositions(place: Path) -> Any:
    found = decompose_many({"w": samples.W}, Request("full"), cache=place)["w"]
    assert float((found.U * found.S @ found.Vh - samples.W).norm()) < 1e-4, "a wrong decomposition"
    cache.ls(place), cache.verify(place)


def read_bodies(place: Path) -> Any:
    for path in sorted(place.iterdir()):
        kind = {"c": protocol.ChatRequest, "p": protocol.CompletionRequest, "l": protocol.LoadRequest}[path.name[0]]
        body = protocol.read_body(path.read_bytes(), kind)
        if isinstance(body, protocol.ChatRequest):
            protocol.checked_messages(body.messages)
        if isinstance(body, protocol.CompletionRequest):
            assert [body.prompts, body.told, body.limit, body.stops]


def read_texts(place: Path) -> Any:
    """Texts of the command line: methods, overrides, patterns."""
    content = (place / "texts").read_bytes() if (place / "texts").is_file() else b""
    for line in content.decode(errors="surrogateescape").split("\n"):
        kind, _, text = line.partition(" ")
        try:
            if kind == "method":
                method = parse(text)
                from_fields(method.fields())
                method.shapes(8, 6)
            elif kind == "set":
                load_config(None, ["model=m", "output=o", "data=d", *text.split(" ")])
            elif kind == "pattern":
                match_everywhere(text)
        except SpectuneError:
            continue


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "a" * 60]


def match_everywhere(text: str) -> None:
    """Have a pattern matched as one of a file, and as each kind of a user's own."""
    matchers: tuple[Callable[[], Any], ...] = (
        lambda: [matches_end(text, name) for name in NAMES],
        lambda: matching(text, NAMES, "targets"),
        lambda: by_pattern({text: 1}, NAMES, "rank_pattern"),
        lambda: in_blocks(NAMES, [0], text),
    )
    for matcher in matchers:
        with contextlib.suppress(SpectuneError):
            matcher()


def read_results(place: Path) -> Any:
    results = Results(place, "x")
    results.get(samples.TRIAL), results.get(Trial("base", None, 0, "final"))
    config = load_config(None, ["model=m", "data=d", f"output={place}", "methods=[svf]"], CompareConfig)
    check_folder(config, "y")


def read_settings(kind: Any) -> Callable[[Path], Any]:
    def read(place: Path) -> Any:
        config = load_config(place / "run.yaml", [], kind)
        config.settings() if kind is CompareConfig else config.where()

    return read


def read_destination(place: Path) -> Any:
    check_destination(place, ["elsewhere"], overwrite=True, merged=True)


def read_machine(place: Path) -> Any:
    rates = mock.patch("spectune.planning.probe.rates", dict)  # which take a second where the file is refused
    with rates, mock.patch.dict(os.environ, {"SPECTUNE_HOME": str(place)}):
        this_machine()


def read_base(place: Path) -> Any:
    model, tokenizer = load_base(str(place), "fp32")
    if sum(p.numel() for p in model.parameters()) < 1 << 22:
        tokenizer("hello")


READERS = {
    **{
        f"adapter {name}": Reader(lambda place, name=name: samples.adapter(name, 1).save(place), use, 3)
        for name in ("svf", "lora:rank=2", "dora:rank=2", "lora_xs:rank=2", "vera:rank=2", "adalora:rank=2")
    },
    "adapter with its bases": Reader(lambda p: samples.adapter("pissa:rank=2", 1).save(p, bases="embed"), use, 3),
    "adapter with whole modules": Reader(lambda p: samples.whole().save(p), use, 3),
    "classifier's adapter": Reader(lambda p: samples.labelled().save(p), use, 2),
    "PEFT": Reader(samples.peft, use, 6),
    "PEFT, AdaLoRA": Reader(samples.peft_adalora, use, 2),
    "PEFT, pickled": Reader(samples.peft_bin, use, 2),
    "library": Reader(samples.library, read_library, 3),
    "run.yaml": Reader(samples.run_yaml, read_settings(TrainConfig), 10),
    "compare.yaml": Reader(samples.compare_yaml, read_settings(CompareConfig), 2),
    "run folder": Reader(samples.run_folder, read_run_folder, 4),
    "checkpoint of a run": Reader(samples.training, read_training, 2),
    "results of compare": Reader(samples.results, read_results, 3),
    "lines of spectrum": Reader(
        samples.ledger, lambda p: Ledger(p / "ledger.jsonl", {"format": 1}).add("z", {"values": []}), 3
    ),
    "safetensors": Reader(samples.checkpoint, read_checkpoint, 4),
    "GGUF": Reader(samples.gguf, lambda p: read_checkpoint(p / "model.gguf"), 4),
    "JSONL": Reader(samples.jsonl, read_records("data.jsonl"), 10),
    "JSON": Reader(samples.json_list, read_records("data.json"), 3),
    "CSV": Reader(samples.csv, read_records("data.csv", "classify"), 8),
    "packed": Reader(samples.packed, read_records("data.jsonl.gz"), 2),
    "prompts": Reader(samples.prompts, lambda p: read_prompts(p / "prompts.txt")),
    "decompositions": Reader(samples.decompositions, read_decompositions, 4),
    "requests": Reader(samples.bodies, read_bodies, 12),
    "texts": Reader(samples.texts, read_texts, 10),
    "destination": Reader(samples.merged, read_destination),
    "machine": Reader(samples.machine, read_machine),
    "base": Reader(samples.base, read_base),
}
EVERY = [name for name, reader in READERS.items() for _ in range(reader.often)]
_SOUND: dict[str, dict[str, bytes]] = {}


def sound(name: str) -> dict[str, bytes]:
    """Return the sound files of a reader by their names."""
    if name not in _SOUND:
        with tempfile.TemporaryDirectory() as root:
            place = Path(root) / "sound"
            place.mkdir()
            READERS[name].make(place)
            _SOUND[name] = {
                path.relative_to(place).as_posix(): path.read_bytes()
                for path in sorted(place.rglob("*"))
                if path.is_file() and not path.name.endswith(".lock")
            }
    return _SOUND[name]


# -- changes

BYTES = (b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"true", b"9" * 5000, b"[" * 3000, b'"\\ud800"', b"NaN")
BYTES += (
    b'"(a+)+"',
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"'",
    b'"',
    b"&a [*a]",
    b"!!python/object:os.x",
)
BYTES += (b"../../x", b"/etc/passwd", b"=", b":", b",", b"rank=", b"((((", b"{1,99999}", b"\\")
STRINGS = ("", "x", "..", "../../x", "/etc/passwd", "\ud800", "\0", "0", "-1", "nan", "(a+)+$", "a" * 3000, "ü", "F32")
STRINGS += (
    "lora",
    "svf",
    "svft",
    "dora",
    "weight",
    "base_model.model.x",
    "🙂",
    "C:\\x",
    "~",
    "null",
    "1e999",
    "[0-9]{1,1000}",
)
NUMBERS: tuple[Any, ...] = (0, -1, 1, 2, 3, 1.5, -0.0, 1e30, -1e300, 1e-320, 2**31 - 1, 2**31, 2**63, 10**30, 10**400)
NUMBERS += (float("inf"), float("nan"))
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)
DTYPES += (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int32, torch.uint16)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Return some value that a document could hold."""
    kind = draw.randrange(9)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 5:
        return draw.choice(STRINGS)
    if kind == 5:
        return draw.choice([None, True, False, [], {}])
    if depth > 2 or kind == 6:
        nested: Any = draw.choice([[], {}])
        for _ in range(draw.choice([1, 3, 70, 400])):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        return nested
    if kind == 7:
        return [value(draw, depth + 1)] * draw.choice([1, 2, 3, 1000 >> 8 * depth])
    return {draw.choice(STRINGS): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def altered(document: Any, draw: random.Random) -> Any:
    """Return a document with one change somewhere."""
    if isinstance(document, dict) and document and draw.random() < 0.9:
        key, kind = draw.choice(list(document)), draw.randrange(8)
        found = dict(document)
        if kind < 5:
            found[key] = altered(found[key], draw)
        elif kind == 5:
            del found[key]
        elif kind == 6:
            found[draw.choice(STRINGS)] = found.pop(key)
        else:
            found[draw.choice([*STRINGS, *found])] = value(draw)
        return found
    if isinstance(document, list) and document and draw.random() < 0.9:
        at, kind = draw.randrange(len(document)), draw.randrange(6)
        if kind < 3:
            return [*document[:at], altered(document[at], draw), *document[at + 1 :]]
        return [document[:at], [*document, document[at]], document[::-1]][kind - 3]
    if isinstance(document, str) and document and draw.random() < 0.4:
        at = draw.randrange(len(document))
        return document[:at] + draw.choice([*STRINGS, "\n", " ", ".", "="]) + document[at + draw.randrange(2) :]
    return value(draw)


def altered_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Return a tensor of another dtype or shape, or with other values."""
    kind = draw.randrange(9)
    if kind == 0:
        return tensor.to(draw.choice(DTYPES))
    if kind == 1:
        return tensor.reshape(*[1] * draw.choice([1, 5, 60]), *tensor.shape)
    if kind == 2:
        return tensor.reshape(-1)[: draw.choice([0, 1, 2])]
    if kind == 3:
        return tensor.reshape(-1)[:1].sum()
    if kind == 4:
        return tensor.mT.contiguous() if tensor.dim() > 1 else tensor.reshape(-1, 1)
    if kind == 5:
        return tensor.reshape(-1)[:1].reshape([1] * tensor.dim()).clone()
    if kind == 6 and tensor.dim():
        return torch.cat([tensor, tensor[:1]])
    found = tensor.clone()
    if found.numel():
        with contextlib.suppress(RuntimeError, OverflowError):
            found.view(-1)[draw.randrange(found.numel())] = draw.choice(
                [float("nan"), float("inf"), 1e30, -1e38, 1e-44, 0, -1]
            )
    return found


def altered_tensors(data: bytes, draw: random.Random) -> bytes:
    """Return the bytes of a safetensors file with a change of a tensor, a name, the metadata, or the header."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, RecursionError, MemoryError, TypeError, AttributeError):
        return mutated(data, draw)
    metadata, kind = header.get("__metadata__") or {}, draw.randrange(8)
    if kind < 4 and tensors:
        key = draw.choice(sorted(tensors))
        tensors[key] = altered_tensor(tensors[key], draw)
    elif kind == 4 and tensors:
        key = draw.choice(sorted(tensors))
        new = altered(key, draw)
        if isinstance(new, str) and "\ud800" not in new:
            tensors[new] = tensors.pop(key).clone() if draw.random() < 0.5 else tensors[key].clone()
        else:
            del tensors[key]
    elif kind == 5 and metadata:
        key = draw.choice(sorted(metadata))
        try:
            text = json.dumps(altered(json.loads(metadata[key]), draw))
        except (ValueError, RecursionError):
            text = str(altered(metadata[key], draw))
        metadata[key] = text.encode(errors="replace").decode()
    elif kind == 6:
        text = json.dumps(altered(header, draw)).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    else:
        return mutated(data, draw)
    try:
        return tensors_bytes({k: v.contiguous().clone() for k, v in tensors.items()}, metadata or None)
    except (SafetensorError, ValueError, KeyError, RuntimeError):  # what no file holds
        return data


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with a change: bits, cuts, repeats, or something put in."""
    at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[max(0, at - draw.randrange(40)) :]
    if kind == 3 and at + 8 <= len(data):  # a length or an offset
        return (
            data[:at]
            + draw.choice([0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
            + data[at + 8 :]
        )
    return data[:at] + draw.choice(BYTES) + data[at + draw.choice([0, 0, 1, 8]) :]


def altered_file(name: str, data: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes with a change of the kind that it holds."""
    if draw.random() < 0.25:
        return mutated(data, draw)
    if name.endswith(".safetensors"):
        return altered_tensors(data, draw)
    try:
        if name.endswith(".jsonl"):
            lines = data.split(b"\n")
            at = draw.randrange(len(lines))
            lines[at] = json.dumps(altered(json.loads(lines[at] or b"{}"), draw)).encode()
            return b"\n".join(lines)
        if name.endswith(".gz"):
            return gzip.compress(altered_file(name.removesuffix(".gz"), gzip.decompress(data), draw), mtime=0)
        if name.endswith((".yaml", ".yml")):
            return yaml.safe_dump(altered(yaml.safe_load(data), draw)).encode()
        if name.endswith(".json") or data[:1] == b"{":
            return json.dumps(altered(json.loads(data), draw)).encode()
        if name.endswith((".pt", ".pth", ".bin")):
            held = torch.load(io.BytesIO(data), weights_only=True)
            key = draw.choice(sorted(held, key=str))
            new = held[key]
            held[key] = altered_tensor(new, draw) if isinstance(new, torch.Tensor) else value(draw)
            buffer = io.BytesIO()
            torch.save(held, buffer)
            return buffer.getvalue()
    except Exception:  # changed before into what it cannot be read as
        pass
    return mutated(data, draw)


def sealed(place: Path) -> None:
    """Put the right checksums into an adapter's folder, as one who made such a file on purpose would."""
    for weights in place.rglob("adapter_model.safetensors"):
        with contextlib.suppress(Exception):
            data = weights.read_bytes()
            config = json.loads((weights.parent / "adapter_config.json").read_text())
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
            tensors = load_tensors(data)
            digests = adapter_folder._metadata(adapter_folder._digest(tensors), adapter_folder._config_digest(config))
            save_file(tensors, weights, {**metadata, **digests})
    for index in place.rglob("library.json"):
        with contextlib.suppress(Exception):
            found = json.loads(index.read_text())
            for one in found["adapters"]:
                one["sha256"] = adapter_folder.folder_digest(index.parent / "adapters" / one["name"])
            index.write_text(json.dumps(found))


def changed_files(name: str, draw: random.Random) -> dict[str, bytes | None]:
    """Return the files of a reader after a few changes; None is one that is taken away."""
    files: dict[str, bytes | None] = dict(sound(name))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        key = draw.choice(sorted(files))
        data, kind = files[key], draw.randrange(40)
        if data is None:
            continue
        if kind == 0:
            files[key] = None
        elif kind == 1:
            files[key] = b""
        elif kind == 2:
            files[key] = files[draw.choice(sorted(files))]
        else:
            files[key] = altered_file(key, data, draw)
    return files


ODD = ("folder", "pipe", "link", "device", "sparse")


def make_odd(path: Path, kind: str) -> None:
    """Put something that is no file in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(3 << 30)


class Fault(AssertionError):
    """Something else than an answer or a SpectuneError came of a case."""


def case(draw: random.Random, place: Path, name: str | None = None) -> str:
    """Try one case in an empty folder and return "read" or "refused".

    Raises:
        Fault: anything else happened.
    """
    name = draw.choice(EVERY) if name is None else name
    for key, data in changed_files(name, draw).items():
        if data is not None:
            (place / key).parent.mkdir(parents=True, exist_ok=True)
            (place / key).write_bytes(data)
    if draw.random() < 0.6:
        sealed(place)
    if draw.randrange(25) == 0 and name not in ("texts", "requests"):  # which are no files
        make_odd(place / draw.choice(sorted(sound(name))), draw.choice(ODD)) if any(place.iterdir()) else None
    return tried(name, place)


def peak_memory(anew: bool = False) -> int:
    """Return the largest resident memory of this process in KiB, since it was last counted anew."""
    if anew:  # else a case could take what an earlier one took
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def tried(name: str, place: Path) -> str:
    """Read a folder and return "read" or "refused".

    Raises:
        Fault: anything else happened.
    """
    before, began = peak_memory(anew=True), time.process_time()
    try:
        READERS[name].read(place)
        outcome = "read"
    except SpectuneError as error:
        outcome = "refused"
        if not str(error) or ("\n" in str(error).strip() and len(str(error)) > 2000):
            raise Fault(f"{name}: {str(error)!r:.200} is not a sentence") from None
    except (Exception, SystemExit) as error:
        raise Fault(f"{name}: {type(error).__name__}: {str(error)[:200]}") from error
    took = time.process_time() - began
    more = (peak_memory() - before) / 1024
    if took > SECONDS:
        raise Fault(f"{name}: took {took:.1f} s")
    if more > MEGABYTES:
        raise Fault(f"{name}: took {more:.0f} MB")
    return outcome


@contextlib.contextmanager
def empty_folder() -> Any:
    """Within the context have an empty folder, in memory where the system has such a place."""
    root = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        yield Path(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def sources(error: BaseException) -> str:
    """Return where in spectune an error came from."""
    cause = error.__cause__ or error
    found = [f for f in traceback.extract_tb(cause.__traceback__) if f"{os.sep}spectune{os.sep}" in f.filename]
    return f"{Path(found[-1].filename).name}:{found[-1].lineno}" if found else "?"


def at_random(
    count: int, first: int = 0, name: str | None = None, keep: Path | None = None
) -> collections.Counter[str]:
    """Try cases by plain random numbers, seeds `first` to `first + count - 1`, and count what came of them.

    Args:
        count: how many.
        first: the first seed.
        name: one reader alone.
        keep: a folder for those that failed, instead of an error at the first.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        with empty_folder() as place:
            try:
                outcomes[case(random.Random(seed), place, name)] += 1
            except Fault as fault:
                if keep is None:
                    raise
                key = f"{str(fault)[:90]} @{sources(fault)}"
                outcomes[f"FAULT {key}"] += 1
                print(f"seed {seed}: {key}", flush=True)
    return outcomes


def by_hypothesis(count: int) -> None:
    """Try cases that hypothesis draws, and shrinks where one fails."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def one(draw: random.Random) -> None:
        with empty_folder() as place:
            case(draw, place)

    one()


class _Fuzzed(random.Random):
    """Draws from the bytes that a fuzzer chose."""

    def __init__(self, data: Any) -> None:
        super().__init__(0)
        self.data = data

    def random(self) -> float:
        return self.data.ConsumeIntInRange(0, 2**16 - 1) / 2**16 if hasattr(self, "data") else super().random()

    def getrandbits(self, k: int) -> int:
        return self.data.ConsumeIntInRange(0, 2**k - 1) if k < 60 else 0


def by_coverage(count: int, rest: list[str]) -> None:
    """Try cases that atheris draws from the lines of spectune that the last ones reached."""
    import atheris

    def one(data: bytes) -> None:
        with empty_folder() as place:
            case(_Fuzzed(atheris.FuzzedDataProvider(data)), place)

    atheris.instrument_all() if "--all" in rest else None
    atheris.Setup([sys.argv[0], f"-atheris_runs={count}", *[r for r in rest if r != "--all"]], one)
    atheris.Fuzz()


def main() -> None:
    """Run as many cases as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--reader", choices=list(READERS))
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--hypothesis", action="store_true")
    parser.add_argument("--keep", type=Path)
    given, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.atheris:
        by_coverage(given.count, rest)
    elif given.hypothesis:
        by_hypothesis(given.count)
        print(f"{given.count} cases by hypothesis")
    else:
        for outcome, times in sorted(at_random(given.count, given.first, given.reader, given.keep).items()):
            print(f"{times} {outcome}")


if __name__ == "__main__":
    main()

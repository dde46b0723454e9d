"""Adapter folders come back bit for bit, are written whole or not at all, and are refused when damaged."""

import json
import os
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.nn as nn
from packaging.version import Version
from safetensors.torch import load_file, save_file

import forked
import spectune
from adapters.adapter_cases import assert_identical, made
from spectune import Adapter, SpectuneError
from spectune.adapters import folder as files
from spectune.adapters.formats import spectune as formats

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# -- another base


# -- written whole or not at all


class Full(OSError):
    pass


def steps() -> list[tuple[Any, str]]:
    return [
        (files, "save_tensors"),
        (Path, "write_text"),
        (os, "fsync"),
        (os, "replace"),
        (Path, "mkdir"),
    ]


@pytest.mark.parametrize("kind", [Full, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(("owner", "function"), steps(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_write_that_fails_at_any_step_leaves_the_old_folder(tmp_path, monkeypatch, owner, function, existing, kind):
    old, new, folder = made("svf", seed=1), made("svf", seed=2), tmp_path / "a"
    right, failures = getattr(owner, function), 0
    for failing in range(1, 9):
        for path in folder.glob("*"):
            path.unlink()
        if existing:
            old.save(folder)
        calls = 0

        def fails(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:  # noqa: B023
                if function == "save_tensors":
                    args[1].write_bytes(b"half")
                raise kind("no space left on device")
            return right(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fails)
            try:
                new.save(folder)
                break  # no more such steps
            except kind:
                failures += 1
        assert {p.name for p in folder.glob("*")} | {p.name for p in folder.glob(".*")} <= {CONFIG, WEIGHTS}
        if existing:
            loaded = Adapter.load(folder)
            # past the second rename only the folder's own flush is left, and the new adapter is there, whole
            assert_identical(loaded, new if function == "fsync" and failing == 3 else old)
        elif folder.exists() and function != "fsync":
            assert not list(folder.iterdir())
    assert failures


def test_a_crash_between_the_two_renames_is_found_out(tmp_path):
    for name, methods_ in (("ours", ("svf", "svf")), ("peft", ("lora:rank=3,alpha=2", "lora:rank=3,alpha=3"))):
        made(methods_[0], seed=1).save(tmp_path / name / "old")
        made(methods_[1], seed=2).save(tmp_path / name / "new")
        torn = tmp_path / name / "old"
        os.replace(tmp_path / name / "new" / WEIGHTS, torn / WEIGHTS)
        if name == "ours":  # same config: nothing is torn
            assert Adapter.load(torn)
            made("lora_xs:rank=2", seed=3).save(tmp_path / name / "new")
            os.replace(tmp_path / name / "new" / WEIGHTS, torn / WEIGHTS)
        with pytest.raises(SpectuneError, match=f"{CONFIG} and {WEIGHTS} do not belong together"):
            Adapter.load(torn)


@pytest.mark.skipif(os.name == "nt", reason="processes are not killed so there")
@pytest.mark.parametrize("renames", [0, 1])
def test_what_a_killed_writer_left_is_finished_or_taken_back(tmp_path, renames):
    old, new, folder = made("svf", seed=1), made("lora_xs:rank=2", seed=3), tmp_path / "a"
    old.save(folder)
    real, done = os.replace, []

    def killed() -> None:
        def replace(source: Path, target: Path) -> None:
            if len(done) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            real(source, target)

        os.replace = replace
        new.save(folder)

    assert forked.ended(killed) == -signal.SIGKILL
    assert len(list(folder.iterdir())) > 2
    assert_identical(Adapter.load(folder), (old, new)[renames])
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_one_adapter_has_one_file(tmp_path):
    adapter = made("svf")
    adapter.labels = ("cat", "dog")
    assert len({(adapter.save(tmp_path / str(i)) / WEIGHTS).read_bytes() for i in range(12)}) == 1


def test_a_folder_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    adapters = [made("svf", seed=seed) for seed in (1, 2)]
    adapters[0].labels, adapters[1].labels = ("cat", "dog"), ("dog", "cat")
    adapters[0].save(tmp_path)
    real, calls = formats.read_more, []

    def meanwhile(path):
        if path != tmp_path:  # a save's own reading of what it is about to write
            return real(path)
        calls.append(1)
        if len(calls) == 1:
            adapters[1].save(tmp_path)
        return real(path)

    monkeypatch.setattr(formats, "read_more", meanwhile)
    loaded = Adapter.load(tmp_path)
    assert (loaded.labels, len(calls)) == (adapters[1].labels, 2)
    assert_identical(loaded, adapters[1])


@pytest.mark.parametrize("method", ["svf", "lora:rank=2"])
def test_a_reader_sees_the_old_adapter_or_the_new_one(tmp_path, method):
    adapters = [made(method, seed=1), made(f"dora:inner={method.replace(':', ',')}", seed=2)]
    adapters[0].save(tmp_path)
    failures: list[BaseException] = []

    def write() -> None:
        for i in range(40):
            adapters[i % 2].save(tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    read = 0
    while writer.is_alive() or not read:
        try:
            loaded = Adapter.load(tmp_path)
            assert_identical(
                loaded, adapters[loaded.layers["0"].terms[0].method == adapters[1].layers["0"].terms[0].method]
            )
            read += 1
        except BaseException as error:
            failures.append(error)
    writer.join()
    assert not failures


def test_what_the_config_may_have_changed_by_hand(tmp_path):
    for method in ("svf", "lora:rank=2"):
        made(method).save(tmp_path)
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
        assert Adapter.load(tmp_path).base_model == "elsewhere"


# -- damaged


@pytest.mark.parametrize("method", ["svf", "lora:rank=2", "svft:pattern=random,width=1"])
def test_truncated_and_flipped_files_are_refused(tmp_path, method):
    whole_adapter = Adapter.load(made(method).save(tmp_path, bases="embed"))
    file = tmp_path / WEIGHTS
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    cuts = {0, 1, 7, 8, 9, header, header + 7, header + 8, header + 9, len(whole) - 1, *range(0, len(whole), 97)}
    for length in sorted(cuts):
        file.write_bytes(whole[:length])
        with pytest.raises(SpectuneError, match=f"{WEIGHTS} is damaged or cut short"):
            Adapter.load(tmp_path)
    for position in sorted({*range(0, len(whole), 41), *range(8), len(whole) - 1}):
        for bit in (1, 128):
            flipped = bytearray(whole)
            flipped[position] ^= bit
            file.write_bytes(flipped)
            try:
                loaded = Adapter.load(tmp_path)
            except SpectuneError:
                continue
            assert_identical(loaded, whole_adapter, bases=True)  # other metadata, no other adapter
    file.unlink()
    with pytest.raises(SpectuneError, match=f"is not an adapter: it has no {WEIGHTS}"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"x": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F4096", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        [],
        "x",
    ],
)
def test_headers_that_promise_the_impossible(tmp_path, header):
    for method in ("svf", "lora:rank=2"):
        made(method).save(tmp_path)
        text = json.dumps(header).encode()
        (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(SpectuneError):
            Adapter.load(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + text)
        with pytest.raises(SpectuneError, match="damaged or"):
            Adapter.load(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    made("svf").save(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(SpectuneError, match=f"it has no {WEIGHTS}"):
        Adapter.load(tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / WEIGHTS)
    with pytest.raises(SpectuneError, match="damaged or"):
        Adapter.load(tmp_path)


# -- a config that is not understood


A, B = torch.ones(1, 2), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"base_model.model.x.lora_A": A * 5}, "two tensors for one part of 'x'"),
        ({"x.lora_A.weight": A * 5}, "two tensors for one part of 'x'"),
        ({"x.lora_B": B * 5}, "two tensors for one part of 'x'"),
        ({"base_model.model.x.lora_A.weight": A.to(torch.float8_e4m3fn)}, "float8_e4m3fn, which no adapter has"),
        pytest.param(
            {"base_model.model.x.lora_B.weight": B.to(torch.complex64)},
            "complex64, which no adapter has",
            marks=pytest.mark.skipif(Version(safetensors.__version__) < Version("0.7"), reason="cannot be written"),
        ),
    ],
)
def test_one_part_has_one_tensor_of_real_numbers(tmp_path, more, told):
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "b"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(
        {"base_model.model.x.lora_A.weight": A, "base_model.model.x.lora_B.weight": B, **more}, tmp_path / WEIGHTS
    )
    with pytest.raises(SpectuneError, match=told):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.bool])
@pytest.mark.parametrize(
    ("method", "odd"),
    [("pissa:rank=2", ["A0", "B0"]), ("svf", ["L", "R"]), ("dora:inner=pissa,rank=2", ["A0", "B0", "norms"])],
)
def test_a_stored_basis_of_an_odd_dtype_is_refused(method, odd, dtype, tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    spectune.adapt(model, method)
    path = spectune.extract(model).save(tmp_path / "a", bases="embed") / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in odd:
        [key] = [key for key in tensors if key.endswith(f"_basis_{name}")]
        save_file(tensors | {key: torch.zeros(tensors[key].shape).to(dtype)}, path)
        with pytest.raises(SpectuneError, match="does not fit the layer"):
            Adapter.load(tmp_path / "a")

"""Adapter folders come back bit for bit, are written whole or not at all, and are refused when damaged."""

import copy
import json
import os
import re
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import forked
import spectune
import tiny
from adapters.adapter_cases import METHODS, assert_same_update, made, moved, small
from spectune import Adapter, SpectuneError
from spectune.adapters import fingerprint
from spectune.adapters import folder as files
from spectune.adapters.formats import spectune as formats
from spectune.adapters.formats.peft import is_peft
from spectune.methods import parse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = torch.linspace(-1, 1, 24).reshape(4, 6)


def assert_identical(ours: Adapter, theirs: Adapter, *, bases: bool = False) -> None:
    assert (ours.base_model, ours.error, list(ours.layers)) == (theirs.base_model, theirs.error, list(theirs.layers))
    mine, its = ([layer.conv1d for layer in a.layers.values()] for a in (ours, theirs))
    assert mine == its or all(mine) or all(its)  # PEFT has one flag for all
    for name, layer in ours.layers.items():
        other = theirs.layers[name]
        assert layer.shape == other.shape
        assert [(t.method, t.weight) for t in layer.terms] == [(t.method, t.weight) for t in other.terms]
        for a, b in zip(layer.terms, other.terms, strict=True):
            pairs = [(a.trained, b.trained)] + ([(a.basis or {}, b.basis or {})] if bases else [])
            for mine, its in pairs:
                assert mine.keys() == its.keys()
                assert all(torch.equal(v, its[k]) and v.dtype == its[k].dtype for k, v in mine.items())


# -- there and back


@pytest.mark.parametrize("bases", ["none", "embed"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_bit_for_bit(tmp_path, method, bases):
    model = small()
    adapter = made(method, model)
    path = adapter.save(tmp_path / "a", bases=bases)
    assert sorted(p.name for p in path.iterdir()) == [CONFIG, WEIGHTS]
    loaded = Adapter.load(path)
    assert_identical(loaded, adapter, bases=bases == "embed" and not is_peft(adapter))
    loaded.save(tmp_path / "b", bases=bases)
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()
    first, second = (load_file(tmp_path / f / WEIGHTS) for f in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())

    spectune.attach(model, adapter, "before")
    expected = model(X)
    spectune.attach(model, loaded, "after")
    assert torch.equal(model(X), expected)
    fresh = spectune.attach(small(), Adapter.load(path))
    torch.testing.assert_close(fresh(X), expected, rtol=1e-5, atol=1e-5)
    assert_same_update(loaded.bind(small()), adapter)


def methods(limit: int) -> st.SearchStrategy[str]:
    rank = st.integers(1, limit)
    width, seed = st.integers(0, limit + 1), st.integers(0, 9)
    plain = st.one_of(
        st.builds("lora:rank={},alpha={},rslora={}".format, rank, st.sampled_from([1, 0.3, 16]), st.booleans()),
        st.sampled_from(["svf", "svf:parametrization=sigmoid,max_mult=2.5", "svft"]),
        st.builds("svft:pattern={},width={},seed={}".format, st.sampled_from(["banded", "top_k"]), width, seed),
        st.builds("svft:pattern=random,width={},seed={},gate={}".format, width, seed, st.booleans()),
        st.builds("{}:rank={}".format, st.sampled_from(["pissa", "milora", "lora_xs", "vera"]), rank),
        st.builds("adalora:rank={0},initial_rank={0}".format, rank),
    )
    return st.one_of(plain, plain.map(lambda text: "dora:inner=" + text.replace(":", ",")))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_rank_and_dtype_comes_back(tmp_path, data):
    out, into = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    method = data.draw(methods(min(out, into)))
    bases = data.draw(st.sampled_from(["none", "embed"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    base = nn.Sequential(nn.Linear(into, out)).to(dtype).eval()
    adapter = made(method, copy.deepcopy(base))
    loaded = Adapter.load(adapter.save(tmp_path / "a", bases=bases))
    assert_identical(loaded, adapter)
    x = torch.randn(3, into, dtype=dtype)
    expected = spectune.attach(copy.deepcopy(base), adapter)(x)
    torch.testing.assert_close(spectune.attach(copy.deepcopy(base), loaded)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bases", ["none", "embed"])
def test_sums_come_back(tmp_path, bases):
    model = small()
    parts = [made(method, model, seed=i) for i, method in enumerate(METHODS)]
    total = parts[0] / 3
    for i, part in enumerate(parts[1:]):
        total = total + (0.1 * i - 0.5) * part
    loaded = Adapter.load(total.save(tmp_path, bases=bases))
    assert_identical(loaded, total)
    assert_same_update(loaded.bind(small()), total)
    torch.testing.assert_close(spectune.attach(small(), loaded)(X), spectune.attach(small(), total)(X))


def test_embedded_bases_need_no_base(tmp_path):
    for method in METHODS:
        adapter = made(method)
        loaded = Adapter.load(adapter.save(tmp_path, bases="embed"))
        if not parse(method).additive:
            continue
        assert_same_update(loaded, adapter, 1e-7)
        assert loaded.self_contained("0")
        loaded.export(tmp_path / "peft")


def test_without_the_base_a_clear_sentence(tmp_path):
    loaded = Adapter.load(made("svf").save(tmp_path))
    for call in (
        lambda: loaded.delta("0"),
        lambda: loaded.compress(2),
        lambda: loaded.export(tmp_path / "x"),
        lambda: loaded.save(tmp_path / "x", bases="embed"),
    ):
        with pytest.raises(SpectuneError, match=r"svf on '0' is stored without its basis.*call adapter.bind\(model\)"):
            call()
    for method in ("dora:rank=2", "dora:inner=svf"):
        loaded = Adapter.load(made(method).save(tmp_path))
        with pytest.raises(SpectuneError, match=r"dora on '0' is stored without its basis.*call adapter.bind"):
            loaded.delta("0")
    loaded = Adapter.load(made("dora:inner=svf").save(tmp_path, bases="embed"))
    with pytest.raises(SpectuneError, match=r"dora on '0' needs the base weight: call adapter.bind\(model\)"):
        loaded.delta("0")
    with pytest.raises(SpectuneError, match="the adapter has no layer '1'"):
        loaded.delta("1")
    with pytest.raises(SpectuneError, match="bases must be 'none' or 'embed', not 'all'"):
        loaded.save(tmp_path, bases="all")  # type: ignore[arg-type]
    with pytest.raises(SpectuneError, match="no layers, so there is nothing to save"):
        Adapter({}).save(tmp_path)


# -- another base


def test_another_base_is_refused_and_the_layer_named(tmp_path):
    loaded = Adapter.load(made("svf").save(tmp_path))
    with pytest.raises(SpectuneError, match=r"another base: the weight of '0' differs"):
        spectune.attach(small(seed=5), loaded)
    tuned = small()
    with torch.no_grad():
        tuned[4].weight.add_(2e-4 * tuned[4].weight.abs().mean() * torch.randn(5, 9))
    for call in (lambda: spectune.attach(tuned, loaded), lambda: Adapter.load(tmp_path).bind(tuned)):
        with pytest.raises(SpectuneError, match=r"another base: the weight of '4' differs"):
            call()
    with pytest.raises(SpectuneError, match=r"another base: the weight of '4' differs"):
        spectune.attach(tuned, made("svf"))  # not through a file
    narrow = nn.Sequential(*small()[:4], nn.Linear(9, 4))
    with pytest.raises(SpectuneError, match=r"another base: '4' is \(4, 9\) here and \(5, 9\) there"):
        spectune.attach(narrow, loaded)
    with pytest.raises(SpectuneError, match="no linear layer '4'"):
        spectune.attach(small()[:4], loaded)


def test_what_needs_no_basis_is_known_to_be_of_another_base_too(tmp_path):
    for method in ("lora:rank=2", "dora:inner=lora,rank=2"):
        adapter = made(method)
        for one in (adapter, Adapter.load(adapter.save(tmp_path))):
            with pytest.raises(SpectuneError, match=r"another base: the weight of .* differs from the one"):
                spectune.attach(small(seed=5), one)
            again = spectune.extract(spectune.attach(small(seed=5), one, check=False))
            for name in adapter.layers:
                torch.testing.assert_close(again.layers[name].terms[0].trained, adapter.layers[name].terms[0].trained)
            spectune.attach(small(seed=5), again)  # which is of that base now


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora:rank=3"])
@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used_in", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_is_the_same_base(tmp_path, method, trained_in, used_in):
    adapter = made(method, small(dtype=trained_in), scale=0.05)
    loaded = Adapter.load(adapter.save(tmp_path))
    model = spectune.attach(small(dtype=used_in), loaded)
    again = spectune.extract(model)
    for name in adapter.layers:
        difference = (again.delta(name) - adapter.delta(name)).norm()
        assert difference <= 0.1 * adapter.delta(name).norm() + 0.03  # DoRA's m is no better known than W


def test_a_basis_that_comes_out_differently_is_refused(tmp_path, monkeypatch):
    from spectune.methods.svf import SVF

    loaded = Adapter.load(made("svf").save(tmp_path))
    right = SVF.basis

    def turned(self: SVF, weight: torch.Tensor, decomposition: Any) -> dict[str, torch.Tensor]:
        tensors = right(self, weight, decomposition)
        return {k: v.flip(1) if k == "L" and weight.shape[0] == 5 else v for k, v in tensors.items()}

    monkeypatch.setattr(SVF, "basis", turned)
    model = small()
    with pytest.raises(SpectuneError, match=r"does not reproduce its update on '4'.*bases=\"embed\""):
        spectune.attach(model, loaded)
    assert not any("adapters" in name for name, _ in model.named_parameters())
    with pytest.raises(SpectuneError, match="does not reproduce its update on '4'"):
        Adapter.load(tmp_path).bind(small()).compress(2)


def test_what_cancels_still_loads(tmp_path):
    model = small()
    for method in METHODS:
        a, b = made(method, model, seed=1), made(method, model, seed=2)
        for total in (a - a, a - 0.99999 * a, (a + b) - (b + a), 0 * a):
            spectune.attach(small(), Adapter.load(total.save(tmp_path)))
            spectune.attach(small(), total)
    untrained = spectune.extract(spectune.adapt(small(), "dora:inner=svf"))
    spectune.attach(small(), Adapter.load(untrained.save(tmp_path)))


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


def resave(path: Any, change: Any) -> None:
    """Change a folder's tensors and leave out the digest, as another tool would."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


_IN_PEFT = "base_model.model.0.svf_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{_IN_PEFT}z"), "lacks the tensor '0.0.z'"),
        (
            lambda t: t.update({f"{_IN_PEFT}z": t[f"{_IN_PEFT}z"][:-1]}),
            r"'0.0.z' in .* is torch.float32 \(5,\), not floating point",
        ),
        (lambda t: t.update({f"{_IN_PEFT}z": t[f"{_IN_PEFT}z"].long()}), "'0.0.z' in .* is torch.int64"),
        (lambda t: t.update({f"{_IN_PEFT}z": t[f"{_IN_PEFT}z"] * torch.inf}), "not finite, in '.*svf_z'"),
        (lambda t: t.update({f"{_IN_PEFT}y": torch.ones(6)}), "a tensor that its config does not speak of: '0.0.y'"),
        (lambda t: t.update({f"{_IN_PEFT}base": torch.ones(2)}), r"'0.base' in .* \(2,\)"),
        (lambda t: t.update({f"{_IN_PEFT}sketch": torch.ones(2)}), r"'0.0.sketch' in .* \(2,\)"),
        (lambda t: t.pop(f"{_IN_PEFT}basis_L"), "stored basis of '0.0' in .* does not fit"),
        (
            lambda t: t.update({f"{_IN_PEFT}basis_L": t[f"{_IN_PEFT}basis_L"][1:]}),
            "stored basis of '0.0' in .* does not fit",
        ),
        (
            lambda t: t.update({f"{_IN_PEFT}basis_R": t[f"{_IN_PEFT}basis_R"][1:]}),
            "stored basis of '0.0' in .* does not fit",
        ),
        (lambda t: t.update({f"{_IN_PEFT}basis_L": torch.zeros(())}), "stored basis of '0.0' in .* does not fit"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
    made("svf").save(tmp_path, bases="embed")
    resave(tmp_path, change)
    with pytest.raises(SpectuneError, match=message):
        Adapter.load(tmp_path)


def test_indices_beyond_the_layer_are_refused(tmp_path):
    made("svft:pattern=random,width=1").save(tmp_path, bases="embed")
    resave(tmp_path, lambda t: t["base_model.model.4.svft_basis_rows"].__setitem__(3, 5))
    with pytest.raises(SpectuneError, match=r"stored basis of '4.0' in .* does not fit"):
        Adapter.load(tmp_path)


# -- a config that is not understood


def test_unknown_and_missing_keys_name_the_nearest(tmp_path):
    made("pissa:rank=2").save(tmp_path)
    right = json.loads((tmp_path / CONFIG).read_text())

    def refused(message: str, change: Any) -> None:
        config = copy.deepcopy(right)
        change(config)
        (tmp_path / CONFIG).write_text(json.dumps(config))
        with pytest.raises(SpectuneError, match=message):
            Adapter.load(tmp_path)

    refused("lacks the key 'layers'", lambda c: c.update(layer=c.pop("layers")))
    refused("lacks the key 'methods'", lambda c: c.pop("methods"))
    refused(
        "'0' in 'layers' in .* the unknown key 'shap'; did you mean 'shape'", lambda c: c["layers"]["0"].update(shap=1)
    )
    refused("'0' in 'layers' in .* lacks the key 'conv1d'", lambda c: c["layers"]["0"].pop("conv1d"))
    refused("item 0 in 'terms' in .* the unknown key 'wait'", lambda c: c["layers"]["0"]["terms"][0].update(wait=1))
    refused("item 0 in 'terms' in .* lacks the key 'weight'", lambda c: c["layers"]["0"]["terms"][0].pop("weight"))
    refused("pissa has no field 'rnk'; did you mean 'rank'", lambda c: c["methods"][0].update(rnk=2))
    refused("pissa lacks the field 'rank'", lambda c: c["methods"][0].pop("rank"))
    refused("unknown method 'pisa'; did you mean 'pissa'", lambda c: c["methods"][0].update(name="pisa"))
    refused("has no 'name'", lambda c: c["methods"][0].pop("name"))
    refused("rank of PiSSA must be an integer >= 1, not 0", lambda c: c["methods"][0].update(rank=0))
    refused("format version 3; this release reads up to 2", lambda c: c.update(format_version=3))
    refused("is a PEFT adapter of type 'PISSA'", lambda c: c.update(library_name="other"))
    refused(
        "'library_name' in .* is 'other': should be 'spectune'",
        lambda c: c.update(library_name="other") or c.pop("peft_type"),
    )
    refused("'layers' in .* is {}: dictionary should have at least 1 item", lambda c: c["layers"].clear())
    refused(
        r"'terms' in '0' in 'layers' in .* is \[\]: list should have at least 1 item",
        lambda c: c["layers"]["0"]["terms"].clear(),
    )
    refused("has method 7, and there are 1", lambda c: c["layers"]["0"]["terms"][0].update(method=7))
    refused(
        "'weight' in item 0 in .* nan: should be a finite number",
        lambda c: c["layers"]["0"]["terms"][0].update(weight=float("nan")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "lacks the key"),
        ('{"rank": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("\udcff", "is not text in UTF-8"),
    ],
)
def test_a_config_that_is_no_json_object(tmp_path, text, message):
    made("svf").save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpectuneError, match=message):
        Adapter.load(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(SpectuneError, match=f"is not an adapter: it has no {CONFIG}"):
        Adapter.load(tmp_path)
    with pytest.raises(SpectuneError, match="there is no adapter folder"):
        Adapter.load(tmp_path / "nowhere")


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**30, 10**400, -(2**63), 1.5, -0.0, 1e308, float("inf"), float("nan"), "", "svf", "0", [], {}]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["name", "rank", "0", "x"]), st.integers(-2, 3), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(p for key, part in inside for p in places(part, (*at, key)))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders in both formats, with a dense mixture of methods in one."""
    root = tmp_path_factory.mktemp("saved")
    model = small()
    total = made("dora:inner=svft,pattern=banded,width=1", model)
    for method in ("svf", "adalora:rank=2", "lora_xs:rank=2"):
        total = total + 0.5 * made(method, model)
    total.save(root / "ours")
    made("lora:rank=2", model, overrides={"0": "lora:rank=3,alpha=2"}).save(root / "peft")
    return root


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_in_a_config_is_read_or_refused(saved, data):
    folder = saved / data.draw(st.sampled_from(["ours", "peft"]))
    whole = (folder / CONFIG).read_text()
    config = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places(config)))
        place = config
        for key in path:
            place = place[key]
        place[last] = data.draw(JSON)
    weights = (folder / WEIGHTS).read_bytes()
    try:
        resave(folder, lambda tensors: None)  # without digests, so that every check is reached
        (folder / CONFIG).write_text(json.dumps(config))
        try:
            loaded = Adapter.load(folder)
            spectune.attach(small(), loaded)
        except SpectuneError as error:
            said = str(error)
        else:
            said = "nothing"
        assert "\n" not in said
        assert re.match(r"[a-zA-Z'\"/]", said)
    finally:
        (folder / CONFIG).write_text(whole)
        (folder / WEIGHTS).write_bytes(weights)


def test_what_is_stored_is_small_and_says_what_it_is(tmp_path):
    made("svf").save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert set(opened.metadata()) == {"format", "sha256", "config_sha256"}
        assert set(opened.keys()) == {f"base_model.model.{n}.svf_{k}" for n in "024" for k in ("z", "sketch", "base")}
    assert moved(spectune.attach(small(), Adapter.load(tmp_path)))


@pytest.mark.parametrize("method", ["svft:pattern=banded,width=2", "svft:pattern=random,width=2", "lora_xs:rank=12"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_trained_in_16_bits_is_the_same_update_in_32(tmp_path, method, dtype):
    def base(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 48))
        U, V = torch.linalg.qr(torch.randn(48, 40))[0], torch.linalg.qr(torch.randn(40, 40))[0]
        with torch.no_grad():  # singular values so near to each other that rounding turns their vectors
            model[0].weight.copy_((U * torch.linspace(1, 1.001, 40)) @ V)
        return model.to(dtype).eval()

    adapter = made(method, base(dtype))
    loaded = Adapter.load(adapter.save(tmp_path / "16"))
    again = spectune.extract(spectune.attach(base(torch.float32), loaded))
    exact = adapter.delta("0")
    assert (again.delta("0") - exact).norm() <= 0.01 * exact.norm()
    assert (loaded.bind(base(torch.float32)).delta("0") - exact).norm() <= 0.01 * exact.norm()

    in_32 = Adapter.load(made(method, base(torch.float32)).save(tmp_path / "32"))
    with pytest.raises(SpectuneError, match=r"does not reproduce its update on '0'.*in the dtype that"):
        spectune.attach(base(dtype), in_32)
    embedded = Adapter.load(made(method, base(torch.float32)).save(tmp_path / "32", bases="embed"))
    spectune.attach(base(dtype), embedded)


def test_the_sketch_of_a_base_is_kept_until_it_is_written_to(tmp_path, monkeypatch):
    made = []
    original = fingerprint._sketch
    monkeypatch.setattr(fingerprint, "_sketch", lambda *a: (made.append(a), original(*a))[1])
    for architecture in (tiny.llama, tiny.gpt2):  # gpt2's weights are views of parameters
        model = spectune.adapt(architecture(), "svf")
        layers = list(spectune.extract(model).layers)
        first = spectune.extract(model).save(tmp_path / "first")
        count = len(made)
        assert count == 3 * len(layers)
        spectune.extract(model).save(tmp_path / "second")
        assert len(made) == count
        with torch.no_grad():
            model.get_submodule(layers[0]).weight.mul_(2)
        changed = spectune.extract(model).save(tmp_path / "third")
        assert len(made) == count + 3
        before, after = (spectune.Adapter.load(path).layers[layers[0]].base_sketch for path in (first, changed))
        torch.testing.assert_close(after[0], 2 * before[0])
        made.clear()


A, B = torch.ones(1, 2), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"base_model.model.x.lora_A": A * 5}, "two tensors for one part of 'x'"),
        ({"x.lora_A.weight": A * 5}, "two tensors for one part of 'x'"),
        ({"x.lora_B": B * 5}, "two tensors for one part of 'x'"),
        ({"base_model.model.x.lora_A.weight": A.to(torch.float8_e4m3fn)}, "float8_e4m3fn, which no adapter has"),
        ({"base_model.model.x.lora_B.weight": B.to(torch.complex64)}, "complex64, which no adapter has"),
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

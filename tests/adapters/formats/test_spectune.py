"""Our own format: adapters come back bit for bit, with bases or without; tensors that do not fit are refused."""

import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import spectune
from adapters.adapter_cases import METHODS, assert_identical, assert_same_update, made, moved, resave, small
from spectune import Adapter, SpectuneError
from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.adapters.formats.peft import is_peft
from spectune.methods import parse

X = torch.linspace(-1, 1, 24).reshape(4, 6)


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


def test_what_cancels_still_loads(tmp_path):
    model = small()
    for method in METHODS:
        a, b = made(method, model, seed=1), made(method, model, seed=2)
        for total in (a - a, a - 0.99999 * a, (a + b) - (b + a), 0 * a):
            spectune.attach(small(), Adapter.load(total.save(tmp_path)))
            spectune.attach(small(), total)
    untrained = spectune.extract(spectune.adapt(small(), "dora:inner=svf"))
    spectune.attach(small(), Adapter.load(untrained.save(tmp_path)))


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


def test_what_is_stored_is_small_and_says_what_it_is(tmp_path):
    made("svf").save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert set(opened.metadata()) == {"format", "sha256", "config_sha256"}
        assert set(opened.keys()) == {f"base_model.model.{n}.svf_{k}" for n in "024" for k in ("z", "sketch", "base")}
    assert moved(spectune.attach(small(), Adapter.load(tmp_path)))

"""Sketches: whether this is the base that an adapter was made on, and whether its update comes out as it was."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from adapters.adapter_cases import METHODS, made, small
from spectune import Adapter, SpectuneError
from spectune.adapters import fingerprint


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


def in_place(weight):
    weight.mul_(2)


def by_data(weight):
    weight.data = 2 * weight


def by_fused_optimizer(weight):
    weight.requires_grad, weight.grad = True, -weight.detach()
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    weight.requires_grad, weight.grad = False, None


@pytest.mark.parametrize("change", [in_place, by_data, by_fused_optimizer])
def test_the_sketch_of_a_base_is_kept_until_it_is_written_to(tmp_path, monkeypatch, change):
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
            change(model.get_submodule(layers[0]).weight)
        changed = spectune.extract(model).save(tmp_path / "third")
        assert len(made) == count + 3
        before, after = (spectune.Adapter.load(path).layers[layers[0]].base_sketch for path in (first, changed))
        torch.testing.assert_close(after[0], 2 * before[0])
        made.clear()

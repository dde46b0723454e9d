"""Terms put on layers: everything is made and checked before the model is touched."""

import pytest
import torch
import torch.nn as nn

from spectune import SVF, SVFT, LoRA, PiSSA, SpectuneError
from spectune.adapters.terms import Term
from spectune.layers.adapted import Adapted
from spectune.model.install import install, master_dtype, prepared, put_on


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def plan(method, *names, **options):
    return {name: (Term(method, {}, **options),) for name in names}


def plain(model):
    return not any(isinstance(module, Adapted) for module in model) and all(p.requires_grad for p in model.parameters())


def test_a_layer_that_fails_leaves_those_before_it_alone():
    model = net()
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    with pytest.raises(SpectuneError, match="'2' holds values that are not finite"):
        install(model, plan(SVF(), "0", "2"), "a")
    assert plain(model)


def test_preparing_reads_and_putting_on_is_what_changes():
    model, x = net(), torch.randn(3, 6)
    before = model(x)
    ready = prepared(model, plan(LoRA(rank=2), "0", "2"), "a")
    assert plain(model)
    assert torch.equal(model(x), before)
    put_on(model, ready)
    assert isinstance(model[0], Adapted)
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name] == []


def test_an_update_that_does_not_come_out_as_it_was_is_refused_unseen():
    model, other = net(), net()
    with torch.no_grad():
        other[0].weight.mul_(torch.rand(5, 1))
    install(other, plan(SVF(), "0"), "a")
    trained = {"z": torch.linspace(0.5, 1.5, 5)}
    basis = other[0].bases[SVF().basis_key].tensors()
    sketch = Term(SVF(), trained, basis=basis).make_sketch(None)
    with pytest.raises(SpectuneError, match="'0'"):
        install(model, {"0": (Term(SVF(), trained, sketch=sketch),)}, "a")
    assert plain(model)


def test_adapters_with_one_basis_share_its_memory_and_others_do_not():
    model = net()
    methods = {"a": SVF(), "b": SVF(), "c": SVFT(), "d": SVFT(pattern="banded"), "e": PiSSA(rank=2)}
    for name, method in methods.items():
        install(model, plan(method, "0"), name)
    assert len(model[0].bases) == 3  # SVF's; U, S and V of both SVFTs; PiSSA's
    model[0].weight.data.mul_(2)
    with pytest.raises(SpectuneError, match="another one than when the adapters there were put on it"):
        install(model, plan(SVF(), "0"), "f")
    assert list(model[0].adapters) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("base", "asked", "held"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "base", torch.bfloat16),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_what_trained_tensors_are_held_in(base, asked, held):
    model = net(base)
    install(model, plan(LoRA(rank=2), "0"), "a", dtype=asked)
    assert {p.dtype for p in model[0].adapters.parameters()} == {held}
    assert master_dtype(model[0].weight) is (torch.float64 if base is torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, "fp16", 16])
def test_a_dtype_that_is_none_is_refused(dtype):
    model = net()
    with pytest.raises(SpectuneError, match="dtype must be a floating-point"):
        install(model, plan(LoRA(rank=2), "0"), "a", dtype=dtype)
    assert plain(model)


def test_frozen_vectors_are_in_the_weights_dtype_where_the_core_alone_trains():
    model = net(torch.bfloat16)
    install(model, plan(SVF(), "0"), "a")
    install(model, plan(PiSSA(rank=2), "0"), "b")
    kinds = {key: {t.dtype for t in basis.tensors().values() if t.dim() > 1} for key, basis in model[0].bases.items()}
    assert kinds == {SVF().basis_key: {torch.bfloat16}, PiSSA(rank=2).basis_key: {torch.float32}}

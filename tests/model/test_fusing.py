"""`fused`: the answers of every method, mixture and choice from W' alone, and nothing else changed."""

import copy
from typing import Any

import psutil
import pytest
import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

import spectune
import tiny
from methods.cases import EVERY, name
from spectune import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.values import PLAIN
from spectune.model import fusing
from spectune.model.fusing import _said, fused_where_it_pays
from spectune.model.routing import base_alone
from spectune.training.tasks.reinforce.rollout import sample


def network(method="lora:rank=2", dtype=torch.float32) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), Conv1D(6, 10)).to(dtype).requires_grad_(False)
    for adapter in "ab":
        spectune.adapt(model, method, name=adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def bases(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}


def unchanged(model, before):
    after = dict(model.named_parameters())
    return all(torch.equal(after[n], p) and type(after[n]) in PLAIN for n, p in before.items())


def alone(model, monkeypatch):
    """Let no adapter answer but through W'."""
    for layer in adapted_layers(model).values():
        monkeypatch.setattr(layer, "tensors", lambda *_: pytest.fail("not fused"))


@pytest.mark.parametrize("where", ["beside", "inplace"])
@pytest.mark.parametrize("method", EVERY, ids=name)
def test_what_is_active_answers(method, where, monkeypatch):
    model, x = network(method), torch.randn(5, 8)
    before = bases(model)
    for choice in ("a", {"a": 0.5, "b": -1.5}, None):
        spectune.activate(model, choice)
        with torch.no_grad():
            expected = model(x)
            with spectune.fused(model, where=where), monkeypatch.context() as patch:
                alone(model, patch)
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(model(x[None]), expected[None], atol=1e-5, rtol=1e-4)
        assert unchanged(model, before)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, x = network("dora:rank=2", dtype), torch.randn(5, 8).to(dtype)
    near: Any = {} if dtype == torch.float64 else {"atol": 0.1, "rtol": 0.05}
    with torch.no_grad():
        expected = model(x)
        with spectune.fused(model):
            torch.testing.assert_close(model(x), expected, **near)


def test_every_change_is_noticed():
    model, x = network(), torch.randn(5, 8)
    last = model[2]

    def expect(choice=None):
        other = copy.deepcopy(model)
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-4)

    with torch.no_grad(), spectune.fused(model):
        writes: Any = [
            lambda: spectune.activate(model, "a"),
            lambda: spectune.activate(model, {"a": 0.3, "b": 0.7}),
            lambda: spectune.activate(model, None),
            lambda: spectune.activate(model, "b"),
            lambda: last.adapters["b"][0].A.mul_(1.5),
            lambda: last.weight.mul_(0.5),
            lambda: setattr(last, "weight", nn.Parameter(last.weight * 2, requires_grad=False)),
            lambda: setattr(last.adapters["b"][0].B, "data", torch.ones_like(last.adapters["b"][0].B)),
            lambda: last.weight.data.copy_(last.weight + 1),
            lambda: last.adapters["b"][0].A.data[0].add_(0.5),
            lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
        ]
        for write in writes:
            write()
            for _ in range(6):
                expect()
        with spectune.route(model, ["a", "b", None, "a", "b"]):
            routed = model(x)
        with base_alone(model):
            torch.testing.assert_close(model(x)[2], routed[2])
    for adapter, row in (("a", 0), ("b", 1)):
        with torch.no_grad():
            torch.testing.assert_close(spectune.activate(model, adapter)(x)[row], routed[row], atol=1e-5, rtol=1e-4)


def test_a_lasting_change_is_fused_anew(monkeypatch):
    model, x = network("svf"), torch.randn(5, 8)
    with torch.no_grad(), spectune.fused(model):
        spectune.activate(model, "a")
        model[0].adapters["a"][0].z.mul_(1.5)
        for _ in range(6):
            expected = model(x)
        alone(model, monkeypatch)
        torch.testing.assert_close(model(x), expected)


def test_a_weight_that_is_a_tensor_is_what_it_is_by_then():
    model, x = network(), torch.randn(5, 8)
    weight = torch.tensor(0.5, requires_grad=True)
    with spectune.fused(model):
        spectune.activate(model, {"a": weight})
        for _ in range(6):
            with torch.no_grad():
                weight += 0.25
                found = model(x)
        model.requires_grad_(False)
        model(x).sum().backward()
    assert weight.grad
    torch.testing.assert_close(found, spectune.activate(model, {"a": 2.0})(x), atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_adapters():
    model, x = network(), torch.randn(5, 8)
    with spectune.fused(model):
        model(x).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if ".adapters.b." in n)
        spectune.activate(model, "a").requires_grad_(False)
        x.requires_grad_()
        model(x).sum().backward()
    with_fused, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, with_fused)


def test_in_place_nothing_else_is_answered():
    model, x = network(), torch.randn(5, 8)
    before = bases(model)

    def refused():
        return pytest.raises(SpectuneError, match="leave")

    with torch.no_grad(), spectune.fused(model, where="inplace"):
        assert not torch.equal(model[0].weight, before["0.weight"])
        with refused(), base_alone(model):
            model(x)
        with refused(), spectune.route(model, ["a"] * 4 + ["b"]):
            model(x)
        with refused(), torch.enable_grad():
            model(x)
        for call in (spectune.merge, spectune.detach, lambda m: spectune.adapt(m, "svf", name="c")):
            with refused():
                call(model)
        for read in (lambda: spectune.extract(model, "a"), model.state_dict, lambda: copy.deepcopy(model)):
            with refused():
                read()
        spectune.activate(model, "a")
        with refused():
            model(x)
    assert unchanged(model, before)


def test_in_place_ends_by_an_exception_too():
    model = network()
    before = bases(model)
    context = spectune.fused(model, where="inplace")
    context.__enter__()
    assert not unchanged(model, before)
    assert not context.__exit__(KeyError, KeyError(), None)
    assert unchanged(model, before)


def test_tied_weights_are_answered_and_stay():
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)})
    model["head"].weight = model["embed"].weight
    spectune.adapt(model, "lora:rank=2", targets=["head"])
    with torch.no_grad():
        model["head"].adapters["default"][0].B.normal_()
        model.eval()
        x = torch.randn(3, 8)
        expected, table = model["head"](x), model["embed"].weight.clone()
        for where in ("beside", "inplace"):
            with spectune.fused(model, where=where):
                torch.testing.assert_close(model["head"](x), expected)
                assert torch.equal(model["embed"].weight, table)


def test_contexts_nest_and_copies_are_not_fused():
    model, x = network(), torch.randn(5, 8)
    with torch.no_grad():
        expected = model(x)
        with spectune.fused(model):
            with spectune.fused(model):
                torch.testing.assert_close(model(x), expected)
            other = copy.deepcopy(model)
            torch.testing.assert_close(model(x), expected)
        spectune.activate(other, "a")
        torch.testing.assert_close(other(x), spectune.activate(model, "a")(x))
    assert all(type(p) is nn.Parameter for p in other.parameters())
    with spectune.fused(model):
        spectune.detach(model)
    assert type(model[0]) is nn.Linear
    assert "fused" not in vars(model[0])


def test_weights_of_inference_mode_answer_as_they_do_outside():
    with torch.inference_mode():
        model, x = network(), torch.randn(5, 8)
        expected = model(x)
        with spectune.fused(model):
            assert torch.equal(model(x), expected)
            model[0].adapters["b"][0].A.mul_(2.0)
            assert not torch.equal(model(x), expected)


def test_what_cannot_be_fused_is_told(monkeypatch):
    model = network()
    for wrong, said in (
        (lambda: spectune.fused(nn.Linear(2, 2)), "no adapter"),
        (lambda: spectune.fused(model, where="there"), "'there'"),
        (lambda: spectune.fused(model.train()), "training mode"),
    ):
        with pytest.raises(SpectuneError, match=said), wrong():
            pass
    model.eval()
    with pytest.raises(SpectuneError, match="one choice"), spectune.route(model, ["a", "b"]), spectune.fused(model):
        pass
    spectune.activate(model, {"a": torch.tensor(0.5)})
    with pytest.raises(SpectuneError, match="tensor"), spectune.fused(model):
        pass
    spectune.activate(model, "a")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100, "total": 100}))
    with (
        pytest.raises(SpectuneError, match=r"560 B, and cpu has 100 B free: use where=\"inplace\""),
        spectune.fused(model),
    ):
        pass
    assert all(layer.fused is None for layer in adapted_layers(model).values())
    with spectune.route(model, ["a", "a"]), spectune.fused(model, where="inplace"), torch.no_grad():
        model(torch.randn(2, 8))


def test_it_is_used_where_it_pays(monkeypatch, caplog):
    caplog.set_level("INFO", "spectune")
    _said.clear()
    model = network("svf")

    def used(passes=100, **settings):
        with torch.no_grad(), fused_where_it_pays(model, passes, **settings):
            return any(layer.fused is not None for layer in adapted_layers(model).values())

    assert used()
    assert used()
    assert len(caplog.messages) == 1
    assert "fused: false" in caplog.messages[0]
    assert not used(5)
    assert not used(allowed=False)
    with spectune.route(model, ["a", "b"]):
        assert not used()
    with base_alone(model):
        assert not used()
    spectune.activate(model, {"a": torch.tensor(1.0)})
    assert not used()
    spectune.activate(model, "a").train()
    assert not used()
    model.eval()
    memory = {"available": 700, "total": 700}
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), memory))
        assert not used()
    assert used()
    with fused_where_it_pays(nn.Linear(2, 2), 100):
        pass


def test_sixteen_bits_that_would_lose_the_update_are_left():
    for size, pays in ((1e-5, False), (0.2, True)):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
        spectune.adapt(model, "lora:rank=4")
        with torch.no_grad():
            model[0].adapters["default"][0].B.normal_().mul_(size)
            with fused_where_it_pays(model.eval(), 200):
                assert (model[0].fused is not None) == pays


def test_thin_factors_are_fused_for_fewer_passes_where_one_row_gains_by_it(monkeypatch):
    thin, also, wide = network("lora:rank=4"), network("dora:inner=lora,rank=4"), network("svf")
    for pays in (True, False):
        monkeypatch.setattr(fusing, "one_row_pays", lambda _, pays=pays: pays)
        for model, passes, fuses in ((thin, 100, pays), (also, 100, pays), (thin, 200, True), (wide, 100, True)):
            with torch.no_grad(), fused_where_it_pays(model, passes):
                assert any(layer.fused is not None for layer in adapted_layers(model).values()) == fuses


def test_generating_is_fused_and_the_same(monkeypatch):
    torch.manual_seed(0)
    model: Any = tiny.llama()
    spectune.adapt(model, "svf")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapters["default"][0].z.add_(0.2 * torch.randn_like(layer.adapters["default"][0].z))
    prompts = [[1, 2, 3], [4, 5, 6]]
    settings: Any = {"max_new_tokens": 40, "temperature": 0.0, "pad": 0, "ends": []}
    plain = sample(model, prompts, 1, **settings, fused=False)
    with monkeypatch.context() as patch:
        patch.setattr(Adapted, "_lean", lambda *_: pytest.fail("not fused"))
        assert sample(model, prompts, 1, **settings) == plain

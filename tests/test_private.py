"""What is done where PyTorch has a private name no longer: the same answers."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectune
from spectune import private
from spectune.layers import adapted, factors, frozen, selection, stacks
from spectune.layers.core_ops import band_entries
from spectune.layers.cores import Banded
from spectune.speed import attention

OWNERS = {
    "_are_functorch_transforms_active": torch._C,
    "_current_graph_task_id": torch._C,
    "_functorch": torch._C,
    "_is_tracing": torch._C,
    "_is_any_autocast_enabled": torch._C,
    "DisableTorchFunction": torch._C,
    "_storage_Use_Count": torch._C,
    "_foreach_copy_": torch,
    "_is_avx512_bf16_supported": torch.cpu,
    "_is_amx_tile_supported": torch.cpu,
    "_fused_sdp_choice": torch,
}


@pytest.fixture
def without(monkeypatch):
    """The module as it is where none of the names is there."""
    for name, owner in OWNERS.items():
        monkeypatch.delattr(owner, name)
    spec = importlib.util.spec_from_file_location("without", private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_none_is_needed_to_import(without):
    assert without.sdp_choice is None
    assert without.is_transformed()  # unknown: plain operations alone
    assert without.graph_task() == -1
    assert not without._in_trace()
    assert not without.multiplies_bfloat16()
    assert without.is_shared(torch.zeros(1))  # unknown: looked at each time
    assert not private.is_shared(torch.zeros(1))
    assert isinstance(without.unseen(), nullcontext)


def test_autocast_is_asked_for_by_device(without):
    assert not without.any_autocast()
    with torch.autocast("cpu", torch.bfloat16):
        assert without.any_autocast()
        assert private.any_autocast()


def test_copies_are_made_one_by_one(without):
    to, of = [torch.zeros(3), torch.zeros(2, 2)], [torch.arange(3.0), torch.ones(2, 2)]
    without.copy_all(to, of)
    assert all(map(torch.equal, to, of))


def test_the_end_of_a_backward_pass_is_told_once_or_never(without, monkeypatch):
    told = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: without.after_backward(lambda: told.append(1)))
    x.sum().backward()
    assert told == [1]
    monkeypatch.delattr(torch.autograd.Variable, "_execution_engine")
    without.after_backward(lambda: told.append(2))
    assert told == [1]


def test_a_core_without_knowing_of_transforms(monkeypatch):
    core = Banded(torch.randn(band_entries(12, 2), dtype=torch.float64), 12, 2)
    t = torch.randn(5, 12, dtype=torch.float64)
    expected = core.apply(t)
    monkeypatch.setattr("spectune.layers.cores.is_transformed", lambda: True)
    torch.testing.assert_close(core.apply(t), expected)


@pytest.mark.parametrize("name", ["flash_attention", "flash_attention_backward", "sdp_choice"])
def test_packed_attention_by_the_public_function(name, monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 7, 8).unbind()
    q.requires_grad_(True)
    ends = torch.tensor([0, 3, 7])

    def found():
        out, _ = attention._attention(torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=ends)
        return out, torch.autograd.grad(out.square().sum(), q)[0]

    expected = found()
    monkeypatch.setattr(attention, name, None)
    for ours, theirs in zip(found(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    alone = F.scaled_dot_product_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], is_causal=True)
    torch.testing.assert_close(found()[0][:, :3], alone.transpose(1, 2))


def test_an_adapted_model_answers_alike_without_any(without, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    spectune.adapt(model, "lora:rank=2", name="a")
    spectune.adapt(model, "lora:rank=3", name="b")
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.1)
    x = torch.randn(3, 12)

    def found():
        with torch.no_grad(), spectune.route(model, ["a", "b", {"a": 0.5, "b": 0.5}]):
            routed = model(x)
        spectune.activate(model, {"a": 1.0, "b": -1.0})
        return [routed, *torch.autograd.grad(model(x).square().sum(), trained)]

    expected = found()
    for module in (adapted, frozen, selection, stacks, factors):
        for name in vars(module).keys() & vars(without).keys() - {"Callable", "Sequence", "Tensor", "torch"}:
            if getattr(module, name) is getattr(private, name, None):
                monkeypatch.setattr(module, name, getattr(without, name))
    for ours, theirs in zip(found(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

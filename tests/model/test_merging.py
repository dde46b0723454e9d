"""Merging: what is folded in, what it refuses, the way back, and ties that transformers writes and reads."""

import copy

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune.layers.adapted import adapted_layers


def shaken(model, *names, by=0.2):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".adapters.{wanted}." in name for wanted in names or ("default",)):
                parameter.add_(by * torch.randn_like(parameter))
    return model


def two():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))
    spectune.adapt(model, "lora:rank=2", name="a")
    spectune.adapt(model, "dora:inner=svf", name="b")
    return shaken(model, "a", "b")


@pytest.mark.parametrize("chosen", ["a", ["b"], ["a", "b"], {"a": 0.5, "b": -1.0}, {"a": {"0": 2.0}}, None])
def test_what_is_named_is_folded_in_and_taken_out_bit_for_bit(chosen):
    model, x = two(), torch.randn(7, 6)
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    live = model(x)
    as_choice = dict.fromkeys(chosen, 1.0) if isinstance(chosen, list) else chosen
    expected = spectune.activate(copy.deepcopy(model), as_choice)(x) if chosen is not None else live
    spectune.merge(model, chosen)
    assert not adapted_layers(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight"}
    torch.testing.assert_close(model(x), expected)
    again = copy.deepcopy(model)
    assert spectune.unmerge(model) is model
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == {
        n: (i, g) for n, (i, _, g) in before.items()
    }
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert torch.equal(model(x), live)
    assert torch.equal(spectune.unmerge(again)(x), live)
    spectune.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_way_back_is_refused_where_it_would_lose_something():
    with pytest.raises(spectune.SpectuneError, match="none was merged"):
        spectune.unmerge(two())
    with pytest.raises(spectune.SpectuneError, match="keep=False"):
        spectune.unmerge(spectune.merge(two(), keep=False))
    with pytest.raises(spectune.SpectuneError, match="'2' was adapted again"):
        spectune.unmerge(spectune.adapt(spectune.merge(two()), "svf", ["2"]))
    model = spectune.merge(two())
    model[2].weight.data.add_(1e-3)
    with pytest.raises(spectune.SpectuneError, match="the merged weight of '2' is another one now"):
        spectune.unmerge(model)


def test_a_broken_adapter_is_not_merged_unless_asked_to_and_nothing_is_changed():
    model = two()
    model[2].adapters["a"][0].B.data[1] = float("inf")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(spectune.SpectuneError, match="merging 'a' into '2' gives values that are not finite"):
        spectune.merge(model, "a")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    spectune.merge(copy.deepcopy(model), "b")
    assert not spectune.merge(model, "a", safe=False)[2].weight.isfinite().all()
    with pytest.raises(spectune.SpectuneError, match="no adapter 'c'"):
        spectune.merge(two(), "c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neither_autocast_nor_inference_mode_touches_what_is_merged(dtype):
    model = shaken(spectune.adapt(tiny.qwen3(), "svf"))
    expected = copy.deepcopy(model)
    spectune.merge(expected)
    with torch.autocast("cpu", dtype), torch.inference_mode():
        spectune.merge(model)
    for merged, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(merged, right)
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
    ],
)
def test_a_weight_that_is_computed_answers_and_is_merged_into_with_a_sentence(norm):
    model, x = nn.Sequential(norm(nn.Linear(6, 6))).eval(), torch.randn(2, 6)
    before = model(x)
    spectune.adapt(model, "svf")
    torch.testing.assert_close(model(x), before)
    way_back = "remove_weight_norm" if norm is nn.utils.weight_norm else "remove_parametrizations"
    with pytest.raises(spectune.SpectuneError, match=f"the weight of '0' is computed from other.*{way_back}"):
        spectune.merge(model)
    torch.testing.assert_close(spectune.detach(model)(x), before)

"""A user's mistake is one sentence that names the culprit; the model is left as it was."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
import tiny
from spectune import SVF, AdaLoRA, LoRA, SpectuneError
from spectune.layers.adapted import adapted_layers


def small() -> Any:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def refused(model, match, *args, **kwargs):
    before = [(type(m), set(vars(m))) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SpectuneError, match=match):
        spectune.adapt(model, *args, **kwargs)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_targets_that_match_nothing_list_the_nearest():
    model = tiny.llama()
    refused(model, r"targets: 'q_prj' matches no linear layer; did you mean 'q_proj'", "svf", ["q_prj"])
    refused(
        model, r"'model.*layer.0.*' matches no linear layer.*the model has q_proj, k_proj", "svf", "model.*layer.0.*"
    )
    refused(model, r"exclude: 'donw_proj' .*did you mean 'down_proj'", "svf", exclude=["donw_proj"])
    refused(model, r"overrides: 'gate_prj' .*did you mean 'gate_proj'", "svf", overrides={"gate_prj": None})
    refused(model, r"targets: '\(' is not a valid regular expression", "svf", "(")
    refused(model, "nothing is left to adapt", "svf", ["q_proj"], exclude=["q_proj"])
    refused(model, "nothing is left to adapt", "svf", [])
    refused(nn.Sequential(nn.Tanh()), "no linear layer", "svf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_names_the_layer(value):
    model = small()
    with torch.no_grad():
        model[2].weight[1, 3] = value
    refused(model, "weight of '2' holds values that are not finite", "svf")


def test_large_but_finite_weights_are_taken():
    model = small()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    spectune.adapt(model, "lora:rank=2")
    assert len(adapted_layers(model)) == 2


def quantize(layer):
    layer.weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.int8), requires_grad=False)


def test_an_integer_weight_is_neither_adapted_nor_merged():
    model = small()
    quantize(model[2])
    refused(model, "the weight of '2' is torch.int8, not a float.*exclude the layer", "svf")
    spectune.adapt(model, "svf", exclude=["2"])
    model = small()
    spectune.adapt(model, "lora:rank=2")
    quantize(model[2])
    with pytest.raises(SpectuneError, match=r"the weight of '2' is torch.int8 and cannot hold a merged update"):
        spectune.merge(model)
    assert len(adapted_layers(model)) == 2


def test_names():
    model = small()
    spectune.adapt(model, "svf", name="a")
    for call in (
        lambda: spectune.adapt(model, LoRA(rank=2), name="a"),
        lambda: spectune.attach(model, spectune.extract(model, "a"), name="a"),
    ):
        with pytest.raises(SpectuneError, match="an adapter 'a' is on the model already"):
            call()
    for name in ("", "a.b", "a b", "keys", "forward"):
        with pytest.raises(SpectuneError, match="cannot be an adapter's name"):
            spectune.adapt(model, "svf", name=name)
    with pytest.raises(SpectuneError, match=r"no adapter 'pirat' is on the model \(there: a\)"):
        spectune.activate(model, "pirat")
    spectune.adapt(model, "lora:rank=2", name="pirate")
    for call in (
        lambda: spectune.activate(model, "pirat"),
        lambda: spectune.activate(model, {"a": 1.0, "pirat": 0.5}),
        lambda: spectune.extract(model, "pirat"),
        lambda: spectune.detach(model, "pirat"),
    ):
        with pytest.raises(SpectuneError, match="no adapter 'pirat' is on the model; did you mean 'pirate'"):
            call()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_weights_of_a_mixture_are_finite_numbers(weight):
    model = small()
    spectune.adapt(model, "svf", name="a")
    with pytest.raises(SpectuneError, match="the weight of adapter 'a' must be a finite number"):
        spectune.activate(model, {"a": weight})
    spectune.activate(model, {"a": 2})
    assert model(torch.ones(1, 6)).isfinite().all()


def test_a_model_without_adapters():
    for call in (lambda m: spectune.activate(m, None), spectune.merge):
        with pytest.raises(SpectuneError, match="the model has no adapter: call"):
            call(small())
    model = small()
    assert spectune.detach(model) is model
    with pytest.raises(SpectuneError, match=r"no adapter 'default' is on the model \(there: none\)"):
        spectune.extract(model)


def test_an_adapter_for_another_model():
    model = small()
    spectune.adapt(model, "svf")
    adapter = spectune.extract(model)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(SpectuneError, match=r"another base: '2' is \(4, 8\) here and \(3, 8\) there"):
        spectune.attach(other, adapter)
    with pytest.raises(SpectuneError, match="no linear layer '2'"):
        spectune.attach(nn.Sequential(nn.Linear(6, 8)), adapter)
    assert not adapted_layers(other)


def test_methods_may_be_text_and_their_mistakes_are_told():
    refused(small(), "unknown method 'svff'; did you mean 'svf'", "svff")
    refused(small(), "lora has no field 'rnk'; did you mean 'rank'", "lora:rnk=4")
    with pytest.raises(SpectuneError, match="t_init"):
        spectune.adapt(small(), AdaLoRA(rank=2, t_init=-1))
    assert adapted_layers(spectune.adapt(small(), SVF()))

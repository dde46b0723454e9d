"""PEFT's closed list of methods: ours are in it as its own are, once, and nobody's else is replaced."""

import pickle

import peft
import pytest
import torch.nn as nn
from peft import PeftType
from peft.utils import PeftType as AsImported

import spectune
import spectune.peft as sp
from spectune.adapters.formats.dialect import type_for
from spectune.methods import METHODS
from spectune.peft import register
from spectune.peft.config import CONFIGS
from spectune.peft.layer import PeftLayer
from spectune.peft.tuner import SpectuneTuner


def test_another_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    with pytest.raises(spectune.SpectuneError, match=r"from 0\.20 and before 0\.22, and 0\.99\.0 is installed"):
        register.register_all()


def test_a_method_of_the_same_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(register.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("SVF"), peft.LoraConfig)
    with pytest.raises(spectune.SpectuneError, match="has a method SVF of its own"):
        register.register_all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora", "take peft.LoraConfig"),
        ("dora", "take use_dora=True"),
        ("head", "not listed"),
        ("lroa", "unknown method"),
    ],
)
def test_what_has_no_config_says_so(name, said):
    with pytest.raises(spectune.SpectuneError, match=said):
        sp.config_of(name)


def test_a_package_that_fails_is_told_of(monkeypatch):
    def failing(failed):
        failed(spectune.SpectuneError("'theirs' cannot be loaded"))
        return {}

    monkeypatch.setattr(register, "load_plugins", failing)
    with pytest.warns(UserWarning, match="PEFT does not know a method: 'theirs' cannot be loaded"):
        register.register_all()


def test_every_method_that_may_have_a_type_is_known():
    for method in METHODS.values():
        value = type_for(method)
        if value is not None:
            config = register.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(value)]
            assert config is sp.config_of(method) is sp.config_of(method.name)
            assert config.method == method.name


def test_a_type_is_a_member_as_any_other():
    member = PeftType("SVF")
    assert member is PeftType["SVF"] is PeftType.SVF is AsImported.SVF
    assert (member.name, member.value, member == "SVF", str.__str__(member)) == ("SVF", "SVF", True, "SVF")
    assert member in list(PeftType)
    assert len(list(PeftType)) == len({each.value for each in PeftType})
    assert pickle.loads(pickle.dumps(member)) is member


def test_to_register_again_changes_nothing():
    before = list(PeftType), dict(register.PEFT_TYPE_TO_CONFIG_MAPPING)
    register.register_all()
    assert (list(PeftType), dict(register.PEFT_TYPE_TO_CONFIG_MAPPING)) == before


@pytest.mark.parametrize("config", CONFIGS)
def test_classes_are_made_where_they_say_that_they_are(config):
    value = type_for(METHODS[config.method])
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType(value)]
    layer, other = tuner.tuner_layer_cls, tuner.other_layer_cls
    assert issubclass(tuner, SpectuneTuner)
    assert issubclass(layer, PeftLayer)
    assert issubclass(other, layer)
    assert tuner.prefix == layer.prefix == f"{value.lower()}_"
    assert "Linear" in layer.__name__
    assert "Linear" not in other.__name__
    for made in (tuner, layer, other):
        assert pickle.loads(pickle.dumps(made)) is made


def test_all_linear_means_linear_layers_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(3, 4)

        def forward(self, x):
            return self.a(x)

    model = peft.get_peft_model(Model(), sp.SVFConfig(target_modules="all-linear"))
    again = peft.PeftModel(model.unload(), sp.SVFConfig(target_modules="all-linear"))
    for held in (model, again):
        found = [name for name, module in held.named_modules() if isinstance(module, PeftLayer)]
        assert all(name.endswith(".a") for name in found)

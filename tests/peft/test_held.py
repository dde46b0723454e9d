"""What PEFT holds for an adapted layer: trained tensors by adapter, what a schedule keeps, what tells a base."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from peft import get_peft_model

import spectune.peft as sp
from spectune.adapters import fingerprint
from spectune.peft.held import HeldUpdate, Scores
from spectune.peft.layer import PeftLayer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 5)

    def forward(self, x):
        return self.lin(x)


@pytest.fixture
def layer() -> Any:
    """Return the layer of a model with two adapters, of PiSSA and of AdaLoRA, which keeps scores."""
    model = get_peft_model(Model(), sp.PiSSAConfig(r=2, target_modules=["lin"]), "one", mixed=True)
    model.add_adapter("two", sp.config_of("adalora")(r=2, target_modules=["lin"], total_steps=10))
    (found,) = [module for module in model.modules() if isinstance(module, PeftLayer) and "two" in module.own]
    return found


@pytest.fixture
def pissa() -> Any:
    model = get_peft_model(Model(), sp.PiSSAConfig(r=2, target_modules=["lin"]), "one")
    model.add_adapter("two", sp.PiSSAConfig(r=2, target_modules=["lin"]))
    (found,) = [module for module in model.modules() if isinstance(module, PeftLayer)]
    return found


def test_trained_tensors_are_the_parameters_that_peft_holds(pissa):
    first, *_ = pissa.own["one"].names
    for adapter in ("one", "two"):
        update = pissa.own[adapter]
        assert isinstance(update, HeldUpdate)
        held = {name: getattr(pissa, f"pissa_{name}")[adapter] for name in update.names}
        assert update.trained().keys() == held.keys()
        for name, parameter in held.items():
            assert update.tensor(name) is update.trained()[name] is getattr(update, name) is parameter
            mapping, key = update.places()[name]
            assert mapping[key] is parameter
    assert pissa.own["one"].tensor(first) is not pissa.own["two"].tensor(first)
    assert [name for name, _ in pissa.own["one"].named_parameters()] == []  # which would be there twice


def test_a_parameter_that_is_put_in_its_place_is_the_one_that_answers(pissa):
    update = pissa.own["one"]
    for name, (mapping, key) in update.places().items():
        mapping[key] = new = nn.Parameter(torch.ones_like(update.tensor(name)))
        assert getattr(update, name) is new
        assert getattr(pissa, f"pissa_{name}")["one"] is new


def test_what_it_does_not_have_is_no_attribute(pissa):
    with pytest.raises(AttributeError):
        _ = pissa.own["one"].magnitude


def test_scores_lie_where_peft_saves_them(layer):
    update = layer.own["two"]
    prefix = layer.prefix
    assert isinstance(layer._modules[f"{prefix}step"], Scores)
    assert update.step is layer._modules[f"{prefix}step"]["two"]
    assert f"{prefix}step" in layer.other_param_names
    update.step = torch.tensor(7)
    assert int(layer._modules[f"{prefix}step"]["two"]) == 7
    assert layer.state_dict()[f"{prefix}step.two"] == 7
    assert "step" not in vars(update)


def test_scores_that_a_folder_has_not_stay_as_they_are():
    scores = Scores({"one": torch.tensor([1.0, 2.0]), "two": torch.tensor([3.0])}, persistent=True)
    assert not any(scores.load_state_dict({"two": torch.tensor([5.0])}))
    assert scores["one"].tolist() == [1.0, 2.0]
    assert scores["two"].tolist() == [5.0]
    unmade = Scores({"one": torch.ones(2, device="meta")}, persistent=True)
    unmade.load_state_dict({}, assign=True)
    assert unmade["one"].tolist() == [0.0, 0.0]


def test_sketches_are_zero_here_and_made_as_they_are_saved(pissa):
    sketches = pissa.pissa_base
    assert sketches["one"].shape == fingerprint.WEIGHT_SHAPE
    assert not sketches["one"].any()
    saved = pissa.state_dict()["pissa_base.one"]
    torch.testing.assert_close(saved, fingerprint.sketch_weight(pissa.adapted.weight.detach()))
    assert not sketches["one"].any()
    assert pissa.pissa_sketch["one"].shape == fingerprint.UPDATE_SHAPE
    assert not pissa.state_dict()["pissa_sketch.one"].any()  # of an update that is zero at the start
    for parameter in pissa.own["one"].trained().values():
        parameter.data.add_(1.0)
    assert pissa.state_dict()["pissa_sketch.one"].any()


def test_what_was_loaded_is_told_once(pissa):
    sketches = pissa.pissa_base
    assert sketches.pop_told("one") is None
    assert sketches.pop_told("nobody") is None
    pissa.unseen.clear()
    sketches.one = torch.full(fingerprint.WEIGHT_SHAPE, 2.0)  # as transformers fills in what it loads
    assert pissa.unseen == {"one"}
    assert sketches.pop_told("one").unique().tolist() == [2.0]
    assert sketches.pop_told("one") is None
    pissa.unseen.clear()

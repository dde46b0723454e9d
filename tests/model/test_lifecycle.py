"""The base is never written to: adapt, attach, train, activate, route, merge a copy and detach, in any order."""

import copy
from typing import Any

import torch
import torch.nn as nn
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.pytorch_utils import Conv1D

import spectune
from spectune.layers.adapted import adapted_layers

METHODS = [
    "svf",
    "svft:pattern=banded,width=1",
    "svft:pattern=random,width=1",
    "lora:rank=2",
    "pissa:rank=2",
    "milora:rank=2",
    "lora_xs:rank=2",
    "dora:rank=2",
    "dora:inner=pissa,rank=2",
    "adalora:rank=2,total_steps=8,interval=1",
    "vera:rank=3",
]
NAMES = ["a", "b", "c"]


def small() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Conv1D(5, 8), nn.LayerNorm(5), nn.Linear(5, 4, bias=False))
    model[2].requires_grad_(False)  # frozen by its owner: it must stay so
    return model.eval()


class Lifecycle(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = small()
        self.x = torch.randn(3, 6)
        self.modules = dict(self.model.named_modules())
        self.types = {name: type(module) for name, module in self.modules.items()}
        self.parameters = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in self.model.named_parameters()}
        self.plain = self.model(self.x).detach()
        self.stored: dict[str, spectune.Adapter] = {}

    @property
    def names(self):
        return spectune.adapter_names(self.model)

    @rule(method=st.sampled_from(METHODS), name=st.sampled_from(NAMES), where=st.sampled_from(["all-linear", "0", "2"]))
    def adapt(self, method, name, where):
        if name not in self.names:
            spectune.adapt(self.model, method, where, name=name)
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            assert trained == {n for n, _ in self.model.named_parameters() if f".adapters.{name}." in n}

    @precondition(lambda self: self.names)
    @rule(data=st.data(), steps=st.integers(1, 2))
    def train(self, data, steps):
        spectune.activate(self.model, data.draw(st.sampled_from(self.names)))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters or [nn.Parameter(torch.zeros(1))], lr=0.05)
        self.model.train()
        for _ in range(steps):
            loss = self.model(self.x).square().sum()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def extract(self, data):
        name = data.draw(st.sampled_from(self.names))
        self.stored[name] = spectune.extract(self.model, name)

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), name=st.sampled_from(NAMES), trainable=st.booleans())
    def attach(self, data, name, trainable):
        if name not in self.names:
            adapter = self.stored[data.draw(st.sampled_from(sorted(self.stored)))]
            spectune.attach(self.model, adapter, name=name, trainable=trainable)
            answer = self.model(self.x)
            fresh = copy.deepcopy(self.model)
            spectune.detach(fresh)
            spectune.attach(fresh, adapter)
            torch.testing.assert_close(fresh(self.x), answer, rtol=1e-4, atol=1e-5)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
    def activate(self, data, weights):
        mixture = dict(zip(self.names, weights, strict=False))
        choice = data.draw(st.sampled_from([None, self.names[0], mixture]))
        spectune.activate(self.model, choice)
        if choice is None:
            assert torch.equal(self.model(self.x), self.plain)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def route(self, data):
        rows = [data.draw(st.sampled_from([None, *self.names])) for _ in range(3)]
        with spectune.route(self.model, rows):
            routed = self.model(self.x)
        for row, plain, choice in zip(routed, self.plain, rows, strict=True):
            assert choice is not None or torch.equal(row, plain)

    @precondition(lambda self: self.names)
    @rule()
    def merge_a_copy(self):
        merged = spectune.merge(copy.deepcopy(self.model))
        assert not adapted_layers(merged)
        torch.testing.assert_close(merged(self.x), self.model(self.x), rtol=1e-4, atol=1e-4)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def detach(self, data):
        spectune.detach(self.model, data.draw(st.sampled_from([None, *self.names])))

    @invariant()
    def base_is_untouched(self):
        if not hasattr(self, "model"):
            return
        for name, (identity, requires_grad, value) in self.parameters.items():
            parameter = self.model.get_parameter(name)
            assert id(parameter) == identity
            assert torch.equal(parameter, value)
            if not self.names:
                assert parameter.requires_grad == requires_grad
        for name, module in self.modules.items():
            assert self.model.get_submodule(name) is module
            assert isinstance(module, self.types[name])
        if not self.names:
            assert {n: type(m) for n, m in self.model.named_modules()} == self.types
            assert torch.equal(self.model(self.x), self.plain)


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=40, stateful_step_count=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_two_pissas_and_a_lora_answer_independently():
    model: Any = small()
    x = torch.randn(4, 6)
    answers = {}
    for name, method in {"p": "pissa:rank=2", "q": "pissa:rank=3", "l": "lora:rank=2"}.items():
        spectune.adapt(model, method, name=name)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = model(x)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        answers[name] = model(x)
        assert not torch.allclose(answers[name], before)
    for name in ("l", "p", "q", "p"):
        spectune.activate(model, name)
        assert torch.equal(model(x), answers[name])
    spectune.detach(model, "p")
    for name in ("q", "l"):
        spectune.activate(model, name)
        assert torch.equal(model(x), answers[name])


def test_adapters_over_one_basis_share_it():
    model: Any = small()
    spectune.adapt(model, "svf", name="a")
    spectune.adapt(model, "svf:parametrization=sigmoid", name="b")
    assert list(model[0].bases) == ["svf"]
    spectune.detach(model, "a")
    assert list(model[0].bases) == ["svf"]
    spectune.detach(model, "b")
    assert not hasattr(model[0], "bases")


def test_detaching_a_trained_adapter_leaves_the_other_one_alone():
    model: Any = small()
    spectune.adapt(model, "svf", "0", name="a")
    spectune.adapt(model, "lora:rank=2", "4", name="b")
    spectune.detach(model, "a")
    assert list(adapted_layers(model)) == ["4"]
    assert type(model[0]) is nn.Linear
    assert not model[0].weight.requires_grad
    spectune.detach(model)
    assert [p.requires_grad for p in model[2].parameters()] == [False, False]
    assert model[0].weight.requires_grad


def test_merging_what_answers_and_nothing_else():
    model: Any = small()
    spectune.adapt(model, "svf", name="a")
    spectune.adapt(model, "lora:rank=2", name="b")
    with torch.no_grad():
        for p in model[0].adapters.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(4, 6)
    spectune.activate(model, {"a": 0.5, "b": 2.0})
    expected, third = model(x), model[4].weight
    flags = [p.requires_grad for p in small().parameters()]
    spectune.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model[4].weight is not third  # it was in the mixture, at an update of zero
    spectune.adapt(model, "svf")
    spectune.activate(model, None)
    before = model[0].weight
    spectune.merge(model)
    assert model[0].weight is before

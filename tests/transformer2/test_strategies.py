"""Strategies by name, by mixture, or a user's own; and what is answered where one is sure of nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectune import SpectuneError
from spectune.transformer2.strategies import ClassifierStrategy, Decision, Fixed, PromptStrategy, make_strategy


def library(*names: str) -> Any:
    def record(name: str) -> Any:
        if name not in names:
            raise SpectuneError(f"no adapter {name!r}")
        return SimpleNamespace(name=name, description=f"does {name}")

    return SimpleNamespace(names=list(names), record=record, records=[record(name) for name in names])


def pool(*names: str) -> Any:
    return SimpleNamespace(library=library(*names), model=object(), activate=lambda choice: None)


TOKENIZER: Any = object()


@pytest.mark.parametrize(
    ("weights", "label"), [({"a": 0.5, "b": 0.5}, "mixture"), ({"a": 2.0}, "a"), ({}, "none"), ({"a": {"0": 1.0}}, "a")]
)
def test_a_mixture_answers_every_prompt_by_its_name(weights, label):
    assert make_strategy(weights, pool("a", "b"), TOKENIZER).choose(["x", "y"]) == [Decision(label, weights)] * 2


def test_a_mixture_is_a_copy_and_of_adapters_that_are_there():
    weights = {"a": 1.0}
    fixed = Fixed(weights)
    weights["a"] = 0.0
    assert fixed.choose(["x"])[0].weights == {"a": 1.0}
    with pytest.raises(SpectuneError, match="no adapter 'c'"):
        make_strategy({"c": 1.0}, pool("a"), TOKENIZER)


def test_an_unknown_name_is_refused_and_an_object_is_taken_as_it_is():
    with pytest.raises(SpectuneError, match="strategy must be 'prompt', 'classifier', a mixture or FewShot"):
        make_strategy("promt", pool("a"), TOKENIZER)
    own: Any = SimpleNamespace(choose=lambda prompts: [])
    assert make_strategy(own, pool("a"), TOKENIZER) is own


class Classifier:
    """Answers with logits that were given to it."""

    def __init__(self, labels, logits, threshold, temperature=1.0):
        self.labels, self._logits = labels, torch.tensor(logits)
        self.calibration = SimpleNamespace(threshold=threshold, temperature=temperature)

    def check(self, library, model):
        pass

    def logits(self, pool, tokenizer, prompts):
        return self._logits


def test_below_the_threshold_the_base_alone_answers():
    classifier: Any = Classifier(["a", "b", "none"], [[3.0, 0.0, 0.0], [0.3, 0.2, 0.0], [0.0, 0.0, 5.0]], 0.6)
    sure, unsure, none = ClassifierStrategy(pool("a", "b"), TOKENIZER, classifier).choose(["x", "y", "z"])
    assert (sure.label, sure.weights) == ("a", {"a": 1.0})
    assert sure.confidence == pytest.approx(sure.scores["a"])
    for decision in (unsure, none):
        assert (decision.label, decision.weights) == ("none", {})
        assert sum(decision.scores.values()) == pytest.approx(1.0)


def test_a_temperature_makes_less_sure():
    for temperature, label in ((1.0, "a"), (10.0, "none")):
        classifier: Any = Classifier(["a", "b"], [[3.0, 0.0]], 0.8, temperature)
        (decision,) = ClassifierStrategy(pool("a", "b"), TOKENIZER, classifier).choose(["x"])
        assert decision.label == label


def test_what_the_base_leans_to_is_measured_anew_when_adapters_came_or_went(monkeypatch):
    asked = []

    def scores(model, tokenizer, library, prompts, bias):
        asked.append(bias)
        return torch.zeros(len(prompts), len(library.names) + 1), torch.tensor(float(len(asked)))

    monkeypatch.setattr("spectune.transformer2.strategies.prompt_scores", scores)
    there = pool("a", "b")
    strategy = PromptStrategy(there, TOKENIZER)
    strategy.choose(["x"])
    strategy.choose(["y"])
    there.library.records[0].description = "does something else"
    strategy.choose(["z"])
    assert asked[0] is None
    assert float(asked[1]) == 1.0
    assert asked[2] is None

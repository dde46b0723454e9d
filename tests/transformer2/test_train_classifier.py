"""Training a classifier: the regression, the split, what comes of it and what lacks for it."""

import pytest
import torch

from spectune import SpectuneError, Transformer2
from spectune.transformer2.classifier import Classifier, regress
from spectune.transformer2.library import Library
from spectune.transformer2.pool import Pool
from spectune.transformer2.train_classifier import logistic_regression, split_prompts, train_classifier
from transformer2 import cases
from transformer2.test_classifier import PROMPTS, WORDS, trained

OTHERS = [f"hello hello the {a} {b}" for a in WORDS for b in WORDS]


def test_regression_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    states = torch.randn(120, 6) * torch.tensor([1.0, 5.0, 0.1, 1.0, 1.0, 1.0]) + 3
    targets = torch.arange(120) % 3
    states += torch.nn.functional.one_hot(targets, 6) * 0.5
    fitted = logistic_regression(states, targets, 3)
    reference = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8)
    reference.fit(((states - fitted["mean"]) / fitted["scale"]).numpy(), targets.numpy())
    torch.testing.assert_close(fitted["weight"], torch.tensor(reference.coef_).float(), atol=2e-3, rtol=0)
    expected = torch.tensor(reference.predict_proba(((states - fitted["mean"]) / fitted["scale"]).numpy())).float()
    torch.testing.assert_close(regress(states, fitted).softmax(-1), expected, atol=2e-3, rtol=0)


def test_no_prompt_is_in_two_parts_of_the_split(tmp_path):
    prompts = {**PROMPTS, "ahoy": [*PROMPTS["ahoy"], *PROMPTS["ahoy"][:5], PROMPTS["say"][0]]}
    labels, split = split_prompts(cases.library(tmp_path, prompts=prompts), OTHERS, 0.5, 0)
    assert labels == [*cases.NAMES, "none"]
    parts = [part.prompts for part in split]
    everything = [prompt for part in parts for prompt in part]
    assert len(everything) == len(set(everything)) == 36 * 4 - 1  # the one of two adapters is left out
    assert [len(part.prompts) for part in split[1:]] == [36, 36]


def test_trained_saved_and_loaded_it_tells_the_prompts_apart(tmp_path):
    pool, classifier = trained(tmp_path, none=OTHERS)
    # of few held-out prompts, by whatever random numbers; chance would be a third
    assert classifier.report["accuracy"] >= 0.8
    assert classifier.report["none_recognised"] >= 0.7
    assert 0 < classifier.calibration.threshold < 1
    again = Classifier.load(Library.open(pool.library.path))
    assert again.report == classifier.report
    logits = [c.logits(pool, cases.tokenizer(), ["ahoy one two"]) for c in (classifier, again)]
    assert torch.equal(*logits)
    two = Transformer2(cases.tiny(), pool.library, strategy="classifier", tokenizer=cases.tokenizer())
    asked = ["ahoy six one", "what is six plus six", "say two and two and two", "hello hello the one two"]
    assert [d.label for d in two.choose(asked)] == [*cases.NAMES, "none"]
    assert two.choose(asked)[3].weights == {}


def test_an_adapter_can_be_trained_to_label(tmp_path):
    pool, classifier = trained(tmp_path, "adapter", method="lora:rank=8", lr=3e-2, epochs=4)
    assert classifier.report["accuracy"] >= 0.9
    two = Transformer2(cases.tiny(), pool.library, strategy="classifier", tokenizer=cases.tokenizer())
    decisions = two.choose(["what is six plus six"] * 2)
    assert [d.label for d in decisions] == ["plus", "plus"]
    assert decisions[0].scores["plus"] == pytest.approx(decisions[0].confidence)
    expected = cases.logits_of(None, cases.ids(1))
    two.pool.activate(None)
    with torch.no_grad():
        torch.testing.assert_close(two.model(cases.ids(1)).logits, expected)  # what labelled does not answer


def test_what_lacks_for_training_is_told(tmp_path):
    few = Pool(cases.tiny(), cases.library(tmp_path / "few", prompts={**PROMPTS, "say": ["say one"]}))
    with pytest.raises(SpectuneError, match=r"'say' has 1 example prompts of its own and .* at least 10"):
        train_classifier(few, cases.tokenizer())
    alone = cases.library(tmp_path / "one", ("svf",), ("ahoy",), PROMPTS)
    with pytest.raises(SpectuneError, match="needs two labels"):
        train_classifier(Pool(cases.tiny(), alone), cases.tokenizer())
    for options, message in (({"held": 1.0}, "held must be"), ({"layer": 9}, "layer must be from 0 to 2")):
        with pytest.raises(SpectuneError, match=message):
            train_classifier(Pool(cases.tiny(), alone), cases.tokenizer(), **options, none=OTHERS)
    with pytest.raises(SpectuneError, match="kind must be hidden or adapter"):
        train_classifier(few, cases.tokenizer(), "tree")  # type: ignore[arg-type]

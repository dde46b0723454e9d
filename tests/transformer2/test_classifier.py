"""The classifier: regression and calibration on known data, training on prompts, and what it is bound to."""

import json

import pytest
import torch

import spectune
from spectune import SpectuneError, Transformer2
from spectune.transformer2.calibration import best, calibrate, calibration_error
from spectune.transformer2.classifier import Classifier, hidden_states, regress
from spectune.transformer2.library import Library
from spectune.transformer2.pool import Pool
from spectune.transformer2.train_classifier import logistic_regression, split_prompts, train_classifier
from transformer2 import cases

WORDS = ["one", "two", "three", "four", "five", "six"]
PROMPTS = {
    "ahoy": [f"ahoy {a} {b}" for a in WORDS for b in WORDS],
    "plus": [f"what is {a} plus {b}" for a in WORDS for b in WORDS],
    "say": [f"say {a} and {b} and {a}" for a in WORDS for b in WORDS],
}
OTHERS = [f"hello hello the {a} {b}" for a in WORDS for b in WORDS]


def trained(path, kind="hidden", **options):
    pool = Pool(cases.tiny(), cases.library(path, prompts=PROMPTS))
    return pool, train_classifier(pool, cases.tokenizer(), kind, **options)


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


def test_temperature_undoes_a_scale_of_the_logits():
    logits = 2 * torch.randn(4000, 4)
    targets = torch.distributions.Categorical(logits=logits).sample()
    found = calibrate(5 * logits, targets, None)
    assert found.temperature == pytest.approx(5, rel=0.15)
    confidence, label = best(5 * logits / found.temperature, None)
    assert calibration_error(confidence, label == targets) < 0.03
    assert calibration_error(*_sure(5 * logits, targets)) > 0.1


def _sure(logits, targets):
    confidence, label = best(logits, None)
    return confidence, label == targets


def test_the_threshold_parts_strangers_from_the_known():
    known = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]).repeat(10, 1) + 0.1 * torch.randn(30, 3)
    targets = torch.arange(30) % 3
    found = calibrate(known, targets, None)  # with its own label taken away a prompt is torn between two
    confidence, _ = best(known / found.temperature, None)
    assert (confidence >= found.threshold).all()
    assert float(best(torch.zeros(1, 3) + 0.1, None)[0]) < found.threshold


def test_with_two_labels_the_threshold_keeps_most_of_what_is_right():
    logits = torch.randn(200, 2) * 3
    targets = logits.argmax(1)
    found = calibrate(logits, targets, None)
    confidence, _ = best(logits / found.temperature, None)
    assert 0.97 <= float((confidence >= found.threshold).float().mean()) < 1


def test_none_that_is_likelier_than_every_name_leaves_no_confidence():
    confidence, label = best(torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]]), 2)
    assert confidence[0] == 0
    assert confidence[1] > 0.5
    assert label.tolist() == [0, 0]


def test_hidden_states_do_not_depend_on_the_batch():
    model, tokenizer = cases.tiny(), cases.tokenizer()
    prompts = ["say one", "what is two plus three and four", "ahoy"]
    together = hidden_states(model, tokenizer, prompts, 1)
    apart = torch.cat([hidden_states(model, tokenizer, [p], 1) for p in prompts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        states = model.model(torch.tensor([tokenizer("say one")["input_ids"]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(together[0], states[1][0].mean(0))


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
    assert classifier.report["accuracy"] >= 0.95
    assert classifier.report["none_recognised"] >= 0.9
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


def test_the_models_own_default_adapter_is_safe(tmp_path):
    model = cases.tiny()
    spectune.adapt(model, "svf")
    pool = Pool(model, cases.library(tmp_path, prompts=PROMPTS))
    with pytest.raises(SpectuneError, match=r"carries an adapter 'default'.*: detach it first"):
        train_classifier(pool, cases.tokenizer(), "adapter")
    assert spectune.adapter_names(model) == ["default"]


def test_it_is_bound_to_the_librarys_names(tmp_path):
    pool, _ = trained(tmp_path)
    pool.library.remove("say")
    with pytest.raises(SpectuneError, match=r"trained on another library .*\(it differs in say\): train it again"):
        Transformer2(cases.tiny(), pool.library, strategy="classifier", tokenizer=cases.tokenizer())


def test_it_is_bound_to_the_base(tmp_path):
    pool, classifier = trained(tmp_path)
    other = cases.tiny()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.5)
    with pytest.raises(SpectuneError, match="trained on another base: the weight of"):
        classifier.check(pool.library, other)


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


def test_no_classifier_and_damaged_ones_are_told(tmp_path):
    pool, _ = trained(tmp_path)
    folder = pool.library.path / "classifier"
    config = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps({**config, "kind": "tree"}))
    with pytest.raises(SpectuneError, match="not a classifier that this release reads"):
        Classifier.load(pool.library)
    (folder / "classifier.json").write_text(json.dumps({**config, "sha256": "0"}))
    with pytest.raises(SpectuneError, match="do not belong together"):
        Classifier.load(pool.library)
    (folder / "classifier.safetensors").write_bytes(b"no")
    with pytest.raises(SpectuneError, match="damaged or missing"):
        Classifier.load(pool.library)
    (folder / "classifier.json").unlink()
    with pytest.raises(SpectuneError, match="has no classifier: train one"):
        Transformer2(cases.tiny(), pool.library, strategy="classifier", tokenizer=cases.tokenizer())

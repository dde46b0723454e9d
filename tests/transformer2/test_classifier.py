"""The classifier: regression and calibration on known data, training on prompts, and what it is bound to."""

import json

import pytest
import torch

import spectune
from spectune import SpectuneError, Transformer2
from spectune.transformer2.classifier import Classifier, hidden_states
from spectune.transformer2.pool import Pool
from spectune.transformer2.train_classifier import train_classifier
from transformer2 import cases

WORDS = ["one", "two", "three", "four", "five", "six"]
PROMPTS = {
    "ahoy": [f"ahoy {a} {b}" for a in WORDS for b in WORDS],
    "plus": [f"what is {a} plus {b}" for a in WORDS for b in WORDS],
    "say": [f"say {a} and {b} and {a}" for a in WORDS for b in WORDS],
}


def trained(path, kind="hidden", **options):
    pool = Pool(cases.tiny(), cases.library(path, prompts=PROMPTS))
    return pool, train_classifier(pool, cases.tokenizer(), kind, **options)


def test_hidden_states_do_not_depend_on_the_batch():
    model, tokenizer = cases.tiny(), cases.tokenizer()
    prompts = ["say one", "what is two plus three and four", "ahoy"]
    together = hidden_states(model, tokenizer, prompts, 1)
    apart = torch.cat([hidden_states(model, tokenizer, [p], 1) for p in prompts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        states = model.model(torch.tensor([tokenizer("say one")["input_ids"]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(together[0], states[1][0].mean(0))


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

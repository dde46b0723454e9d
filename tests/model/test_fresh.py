"""Heads that a checkpoint lacked: known, trained and saved."""

import copy

import pytest
import torch

import spectune
from model.test_whole import LORA, answer, moved, saved_and_back
from tiny import BERT, TEXT, tf


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Checkpoints of encoders without a head, by family."""
    configs = {
        "bert": (tf.BertModel, tf.BertConfig(**BERT)),
        "roberta": (tf.RobertaModel, tf.RobertaConfig(**BERT)),
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT)),
    }
    folders = {}
    for family, (kind, config) in configs.items():
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family)
        kind(config).save_pretrained(folders[family])
    return folders


def classifier(folder, seed, **options):
    torch.manual_seed(seed)
    return tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options).eval()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_head_that_the_checkpoint_lacked_is_trained_and_saved(encoders, tmp_path, family, copied):
    model = classifier(encoders[family], 1)
    model = copy.deepcopy(model) if copied else model  # which loses transformers' marks
    plain = answer(model)
    spectune.adapt(model, LORA)
    torch.testing.assert_close(answer(model), plain, atol=1e-6, rtol=1e-5)  # training starts where the model was
    expected = answer(moved(model))
    loaded = saved_and_back(spectune.extract(model), tmp_path)
    other = spectune.attach(classifier(encoders[family], 2), loaded)
    torch.testing.assert_close(answer(other), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(answer(spectune.detach(model)), plain)


def test_a_head_that_was_trained_before_is_adapted_as_any_layer(encoders, tmp_path):
    model = classifier(encoders["bert"], 1)
    model.save_pretrained(tmp_path)
    spectune.adapt(model := classifier(tmp_path, 2), LORA)
    assert not spectune.extract(model).layers["classifier"].terms[0].method.replaces
    merged = spectune.merge(spectune.adapt(classifier(encoders["bert"], 1), LORA))
    again = spectune.extract(spectune.adapt(merged, LORA))  # which has its head now
    assert not again.layers["classifier"].terms[0].method.replaces


def test_a_head_of_an_unknown_checkpoint_counts_as_new_and_that_is_said(caplog):
    model = tf.BertForSequenceClassification(tf.BertConfig(**BERT))
    spectune.adapt(model, LORA)
    assert "BertForSequenceClassification comes from: its head (classifier)" in caplog.text

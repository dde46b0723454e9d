"""Heads that a checkpoint has: kept under the labels' other spellings, refused under other names, or new when asked."""

import pytest
import torch

import tiny
from spectune import SpectuneError
from spectune.bases.classifiers import load_classifier
from spectune.model.fresh import fresh_modules
from tiny import BERT, tf


class Tokenizer:
    pad_token_id = 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    config = tf.BertConfig(**BERT, id2label=names, label2id={name: i for i, name in names.items()})
    tf.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def loaded(folder, labels, **options):
    config = tf.AutoConfig.from_pretrained(folder)
    return load_classifier(str(folder), config, Tokenizer(), labels, {}, **options)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["NEGATIVE", "POSITIVE"], ["NEGATIVE", "POSITIVE"]),
        (["positive", "negative"], ["negative", "positive"]),
        (["0", "1"], ["0", "1"]),
    ],
)
def test_a_head_is_kept_under_other_spellings_of_its_labels(checkpoint, labels, order):
    model = loaded(checkpoint, labels)
    assert [model.config.id2label[i] for i in range(2)] == order
    plain = tf.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    assert not fresh_modules(model)


def test_a_head_for_other_names_is_not_lost_unasked(checkpoint):
    with pytest.raises(SpectuneError, match=r"tells apart NEGATIVE, POSITIVE, and the labels are ham, spam: name them"):
        loaded(checkpoint, ["ham", "spam"])
    assert fresh_modules(loaded(checkpoint, ["ham", "spam"], new_head=True)) == ["classifier"]
    assert fresh_modules(loaded(checkpoint, ["a", "b", "c"])) == ["classifier"]  # which it can be none for


def test_a_head_that_is_not_there_is_new_without_asking(tmp_path):
    tiny.ARCHITECTURES["bert"]().base_model.save_pretrained(tmp_path)
    assert "classifier" in fresh_modules(loaded(tmp_path, ["ham", "spam"]))

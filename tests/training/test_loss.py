"""The chunked cross-entropy against the model's own logits."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteConfig, GraniteForCausalLM

import spectune
from spectune.training import loss as loss_module
from spectune.training.batches import Packer
from spectune.training.loss import IGNORE, cross_entropy_sum
from spectune.training.tasks.sft import encode
from training.folder import make_model, make_tokenizer

RECORDS = [{"prompt": "one plus two is", "completion": "three"}, {"text": "ahoy"}, {"text": "say hello and ahoy and"}]


def batch(model, padded=False):
    packer = Packer(model, 0)
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    inputs = packer._padded(examples) if padded else packer(examples)
    inputs.pop("shift_labels", None)
    return inputs, inputs.pop("labels")


def reference(model, inputs, labels):
    logits = model(**inputs, use_cache=False).logits.float().flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("at_once", [1 << 23, 130])
def test_values_and_gradients(padded, at_once, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK", at_once)
    model = spectune.adapt(make_model(), "lora:rank=2").train()
    inputs, labels = batch(model, padded)
    ours, theirs = cross_entropy_sum(model, inputs, labels), reference(model, inputs, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(model, 3 * ours), gradients(model, 3 * theirs), atol=1e-4, rtol=1e-4)
    assert "forward" not in vars(model.lm_head)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(model, inputs, labels), theirs)


def granite():
    config = GraniteConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=7.0,
    )
    return spectune.adapt(GraniteForCausalLM(config), "lora:rank=2")


def with_an_adapted_head():
    return spectune.adapt(make_model(tie_word_embeddings=False), "lora:rank=2", targets=["lm_head", "q_proj"])


def all_trained():
    return make_model()


@pytest.mark.parametrize("make", [granite, with_an_adapted_head, all_trained])
def test_where_the_product_is_not_the_models_answer_its_logits_are_used(make):
    model = make().train()
    inputs, labels = batch(model)
    for _ in range(2):
        ours, theirs = cross_entropy_sum(model, inputs, labels), reference(model, inputs, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(model, ours), gradients(model, theirs))


def test_no_logits_of_all_positions_are_made(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK", 80)
    model = spectune.adapt(make_model(), "svf").train()
    inputs, labels = batch(model)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.shape) or t, lambda t: t):
        cross_entropy_sum(model, inputs, labels)
    assert labels.numel() > 2
    assert not [shape for shape in largest if shape[-1:] == (40,) and shape[:-1].numel() >= labels.numel()]

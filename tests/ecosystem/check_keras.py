"""Keras: a merged model loads in keras_hub, with equal logits."""

import keras
import keras_hub
import pytest
import torch
import transformers
from ecosystem_cases import ROWS, moved

import spectune
import tiny
from training.folder import make_tokenizer


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("new", [lambda: tiny.llama(initializer_range=0.2), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", [spectune.SVF(), spectune.LoRA(rank=4)], ids=["svf", "lora"])
def test_logits_are_equal(new, method, tmp_path):
    model = moved(spectune.adapt(new(), method)).eval()
    with torch.no_grad():
        expected = model(ROWS).logits
    spectune.merge(model).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path))
    hidden = backbone({"token_ids": ROWS.numpy(), "padding_mask": torch.ones_like(ROWS).numpy()}, training=False)
    logits = backbone.token_embedding(hidden, reverse=True)
    off = (torch.tensor(keras.ops.convert_to_numpy(logits)) - expected).abs().max().item()
    print(f"off by {off:.1e} of {expected.abs().max().item():.1f}")
    assert off < 1e-3

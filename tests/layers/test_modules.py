"""Names of layers are the base's own, whatever is wrapped around the model; what is no layer of the base stays out."""

import copy

import peft
import pytest
import torch
import torch.nn as nn
import transformers as tf
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import spectune
import tiny
from spectune.layers.adapted import adapted_layers


class Wrapper(nn.Module):
    """A plain module around a transformers model."""

    def __init__(self, model):
        super().__init__()
        self.encoder = model


def checkpointed(model):
    model.transformer.h[0] = checkpoint_wrapper(model.transformer.h[0])
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("first", ["adapted", "wrapped"])
def test_an_adapter_of_a_wrapped_model_fits_the_model(wrap, first, tmp_path):
    model, ids = tiny.gpt2(), tiny.batch("gpt2")["input_ids"]
    plain = spectune.extract(spectune.adapt(tiny.gpt2(), "lora:rank=2"))
    wrapped = (
        wrap(spectune.adapt(model, "lora:rank=2")) if first == "adapted" else spectune.adapt(wrap(model), "lora:rank=2")
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter = spectune.extract(wrapped)
    assert adapter.layers.keys() == plain.layers.keys()
    adapter.save(tmp_path)
    loaded = spectune.Adapter.load(tmp_path)
    expected = spectune.attach(tiny.gpt2(), loaded)(ids).logits
    torch.testing.assert_close(spectune.attach(wrap(tiny.gpt2()), loaded)(ids).logits, expected)
    spectune.merge(wrapped)
    assert not adapted_layers(wrapped)
    torch.testing.assert_close(wrapped(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("config", [peft.LoraConfig(r=2), peft.IA3Config(), peft.VeraConfig(r=2)])
def test_the_layers_of_a_peft_model_are_its_bases(config):
    model = tiny.qwen3()
    config.target_modules, config.feedforward_modules = ["q_proj", "down_proj"], ["down_proj"]
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    spectune.adapt(wrapped, "svf")
    assert list(adapted_layers(wrapped)) == list(adapted_layers(spectune.adapt(model, "svf")))
    wrapped(**tiny.batch("qwen3")).loss.backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    spectune.attach(tiny.qwen3(), spectune.extract(wrapped))


def test_every_kind_of_output_embedding_stays_out_of_all_linear():
    shared = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    musicgen = tf.MusicgenMelodyForCausalLM(
        tf.MusicgenMelodyDecoderConfig(vocab_size=32, **shared, ffn_dim=64, num_codebooks=2)
    )
    bark = tf.BarkFineModel(
        tf.BarkFineConfig(
            hidden_size=32, num_layers=1, num_heads=2, input_vocab_size=32, output_vocab_size=32, block_size=16
        )
    )
    for model in (Wrapper(musicgen), bark, Wrapper(tiny.bert()), Wrapper(tiny.t5())):
        layers = adapted_layers(spectune.adapt(model, "lora:rank=2"))
        assert layers
        assert not [name for name in layers if "lm_head" in name or name.endswith("cls.predictions.decoder")]

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner, self.scores = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.scores.weight = self.table.weight

    assert list(adapted_layers(spectune.adapt(Tied(), "lora:rank=2"))) == ["inner"]


def test_detaching_gives_back_what_trained_however_adapters_came():
    def frozen(model):
        return [n for n, p in model.named_parameters() if not p.requires_grad]

    model = tiny.mistral()
    first, second = model.model.layers
    spectune.adapt(first, "lora:rank=2", name="a")
    spectune.adapt(model, "lora:rank=2", name="b")
    spectune.detach(model)
    assert not frozen(model)
    spectune.adapt(first, "lora:rank=2", name="a")
    spectune.adapt(second, "lora:rank=2", name="b")
    spectune.adapt(model, "lora:rank=2", name="c")
    spectune.detach(spectune.detach(spectune.detach(model, "a"), "c"), "b")
    assert not frozen(model)
    model.model.norm.weight.requires_grad_(False)
    spectune.adapt(model, "lora:rank=2")
    spectune.detach(first)
    assert not frozen(first)
    assert frozen(model.model.embed_tokens)
    spectune.detach(second)
    assert frozen(model) == ["model.norm.weight"]

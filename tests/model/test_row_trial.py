"""Rows of a batch are found wherever a model keeps them, answered apart where a layer has none, or refused by name."""

from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as tf

import spectune
import tiny
from spectune import DoRA, LoRA, SpectuneError
from spectune.bases.generation import cache_key

ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}


def adapted(model: Any) -> Any:
    """Put two adapters on a model, far enough from their start to change what it says."""
    spectune.adapt(model.eval(), LoRA(rank=2), name="a")
    spectune.adapt(model, DoRA(LoRA(rank=2)), name="b")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def check(model, run, batch, choices=("a", None, "b", {"a": 0.5, "b": 0.5})):
    """Compare each row of run(batch) (rows first) with what the row gives by itself."""
    choices = choices[: len(batch)]
    with torch.no_grad():
        alone = []
        for i, choice in enumerate(choices):
            spectune.activate(model, choice)
            alone.append(run(batch[i : i + 1]))
        spectune.activate(model, None)
        with spectune.route(model, choices):
            together = run(batch)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def ids(rows=4, length=6):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(2))


def hidden(model):
    return lambda x: model(x).last_hidden_state


def both_ways(model):
    return lambda x: model(input_ids=x, decoder_input_ids=x)[0]


def switch():
    config = tf.SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4
    )
    return tf.SwitchTransformersModel(config)


def conformer():
    config = tf.Wav2Vec2ConformerConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_kernel=(4, 2),
        conv_stride=(4, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        position_embeddings_type="relative",
    )
    return tf.Wav2Vec2ConformerModel(config)


def swinv2():
    return tf.Swinv2Model(
        tf.Swinv2Config(image_size=16, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4)
    )


def deberta():
    config = tf.DebertaConfig(**tiny.BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return tf.DebertaModel(config)


@pytest.mark.parametrize("length", [4, 6])  # as many as there are rows, too
@pytest.mark.parametrize("build", [switch, conformer, deberta], ids=lambda build: build.__name__)
def test_rows_of_texts_and_sounds(build, length):
    torch.manual_seed(0)
    model = adapted(build())
    if build is conformer:
        check(model, hidden(model), torch.randn(4, 8 * length))
    else:
        check(model, both_ways(model) if build is switch else hidden(model), ids(4, length))


def test_windows_of_pictures():
    torch.manual_seed(0)
    model = adapted(swinv2())
    for size in (16, 32):  # one window for each row in the last stage of the smaller
        check(model, hidden(model), torch.randn(4, 3, size, size))


@pytest.mark.filterwarnings("ignore:left out of 'all-linear'.*torch's own attention")
def test_time_before_rows():
    torch.manual_seed(0)
    model = adapted(nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 2))
    for length in (4, 5, 1):
        check(model, lambda x: model(x.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1), torch.randn(4, length, 16))


def test_experts_answer_with_the_adapter_of_the_row_that_a_token_is_of_while_generating():
    torch.manual_seed(0)
    config = tf.NllbMoeConfig(
        **ENCODER_DECODER,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        expert_capacity=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    config.eos_token_id = None
    model = adapted(tf.NllbMoeForConditionalGeneration(config))
    for beams in (1, 2):
        check(model, lambda x, k=beams: model.generate(x, max_new_tokens=4, num_beams=k, do_sample=False), ids())


class Around(nn.Module):
    """An embedding, a middle part and a layer after it."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed, self.middle, self.last = nn.Embedding(96, 8), middle, nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.middle(self.embed(x)))


class Mixing(nn.Module):
    """A row is given the mean over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.project(x - x.mean(0, keepdim=True))


def test_rows_that_depend_on_each_other_are_refused_by_name():
    torch.manual_seed(0)
    model = adapted(Around(Mixing()))
    with spectune.route(model, ["a", "b"]), pytest.raises(SpectuneError, match=r"'middle\.project'.* depends on the"):
        model(ids(2))
    with torch.no_grad(), spectune.route(model, ["a", "a"]):
        together = model(ids(2))
    torch.testing.assert_close(together, spectune.activate(model, "a")(ids(2)))


def test_norms_over_the_batch_in_training_are_refused():
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    check(model, model, torch.randn(4, 4))
    with spectune.route(model.train(), ["a", "b"]), pytest.raises(SpectuneError, match=r"'1' takes its mean"):
        model(torch.randn(2, 4))


def test_a_trial_leaves_no_trace():
    torch.manual_seed(0)
    model = adapted(tiny.gpt2()).train()
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    state = torch.get_rng_state()
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad(), spectune.route(model, ["a", "b"]):
        model(ids(2), **{cache_key(model): cache})
        once = torch.get_rng_state()
        model(ids(2)[:, :1], **{cache_key(model): cache})
    assert cache.get_seq_length() == 7
    torch.set_rng_state(state)
    with torch.no_grad():
        model(ids(2))
    assert torch.equal(torch.get_rng_state(), once)
    for name, module in model.named_modules():
        after = vars(module)
        assert after.keys() == before[name].keys()
        assert after["training"] == before[name]["training"]
        assert not after["_forward_hooks"]
        assert not after["_forward_pre_hooks"]


def test_a_model_is_tried_once_for_each_kind_of_call():
    model = adapted(tiny.llama())
    passes = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: passes.append(None))
    with torch.no_grad():
        for batch in (ids(2), ids(3, 9), ids(4, 8)):
            with spectune.route(model, ["a", "b", None, "a"][: len(batch)]):
                model(batch)
    assert len(passes) == 3 + 3

"""Layers that a model goes past: left out, refused by name, and noticed where nothing could be tried before."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers as tf
from packaging.version import Version

import spectune
import tiny
from spectune.layers.adapted import adapted_layers
from spectune.model.targets import never_asked


def jamba():
    config = tf.JambaConfig(
        **{**tiny.TEXT, "num_hidden_layers": 2},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    return tf.JambaForCausalLM(config).eval()


def layoutlmv3():
    config = tf.LayoutLMv3Config(
        **tiny.BERT,
        max_2d_position_embeddings=64,
        coordinate_size=6,
        shape_size=4,
        has_relative_attention_bias=True,
        has_spatial_attention_bias=True,
        rel_pos_bins=8,
        max_rel_pos=16,
        rel_2d_pos_bins=8,
        max_rel_2d_pos=16,
        input_size=16,
        patch_size=8,
    )
    return tf.LayoutLMv3Model(config).eval()


since_5_16 = pytest.mark.skipif(Version(tf.__version__) < Version("5.16"), reason="until then Jamba calls dt_proj")


@pytest.mark.parametrize(("build", "past"), [pytest.param(jamba, "dt_proj", marks=since_5_16), (layoutlmv3, "rel_pos")])
def test_layers_whose_weight_the_model_reads_are_left_out_and_refused_by_name(build, past):
    model = build()
    rng, modes = torch.random.get_rng_state(), [m.training for m in model.modules()]
    before = {name: p.clone() for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert all(past in name for name in never_asked(model))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    with pytest.warns(UserWarning, match=rf"left out of 'all-linear'.*{past}.*reads its weight itself"):
        spectune.adapt(model, "svf")
    assert not [name for name in adapted_layers(model) if past in name]
    with pytest.raises(spectune.SpectuneError, match=rf"no effect on .*{past}"):
        spectune.adapt(build(), "svf", rf".*{past}.*")
    with pytest.raises(spectune.SpectuneError, match=rf"no effect on .*{past}"):
        spectune.adapt(
            build(), "svf", ["o_proj" if past == "dt_proj" else "query"], overrides={rf".*{past}.*": "lora:rank=1"}
        )


def test_functional_calls_ask_the_adapter():
    model = spectune.adapt(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "lora:rank=2")
    model[0].adapters["default"][0].B.data.normal_()
    x = torch.randn(3, 6)
    expected = model(x)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), x), expected)
    inner = torch.func.functional_call(model[0], {"weight": model[0].weight}, x).relu()
    assert torch.equal(inner, expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_code_of_classes_with_a_forward_of_their_own(gradients):
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * 1.0

    class Mixed(nn.Module):
        def __init__(self, reads):
            super().__init__()
            self.own, self.conv, self.reads = Scaled(6, 6), nn.Conv1d(6, 6, 1), reads

        def forward(self, x):
            y = self.conv(self.own(x).mT).mT
            of_own = F.linear(y, self.own.weight) if self.reads == "own" else y
            return F.linear(of_own, self.conv.weight[:, :, 0]) if self.reads == "conv" else of_own

    x = torch.randn(2, 3, 6)
    with torch.set_grad_enabled(gradients):
        for reads in ("own", "conv", None):
            model = spectune.adapt(Mixed(reads), "lora:rank=2", ["own", "conv"])
            for parameter in model.parameters():
                parameter.data += 0.1
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            if reads is None:
                torch.testing.assert_close(compiled(x), model(x))
            else:
                with pytest.raises(spectune.SpectuneError, match=f"reads the weight of '{reads}' itself"):
                    compiled(x)
    torch._dynamo.reset()


def test_what_a_trial_saw_called_is_compiled_by_any_backend():
    model = spectune.adapt(tiny.t5(), "lora:rank=2")  # which looks at its weights' dtype
    ids = torch.tensor([[3, 4, 5]])
    compiled = torch.compile(model, backend="eager")(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(compiled, model(input_ids=ids, decoder_input_ids=ids).logits)
    torch._dynamo.reset()


def test_another_function_in_the_place_of_forward_is_noticed_before_and_after():
    def replaced():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].forward = lambda x: F.linear(x, model[0].weight) * 2
        return model

    with pytest.warns(UserWarning, match="'0', because another function was put in the place"):
        assert set(adapted_layers(spectune.adapt(replaced(), "lora:rank=2"))) == {"1"}
    with pytest.raises(spectune.SpectuneError, match="no effect on '0'"):
        spectune.adapt(replaced(), "lora:rank=2", ["0"])
    later = spectune.adapt(nn.Sequential(nn.Linear(4, 4)), "lora:rank=2")
    layer = later[0]
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)  # asks the adapter
    later(torch.randn(2, 4))
    layer.forward = lambda x: F.linear(x, layer.weight)  # does not
    with pytest.raises(spectune.SpectuneError, match="reads the weight of '0'"):
        later(torch.randn(2, 4))


def test_attach_refuses_what_adapt_refuses():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 8)

    term = spectune.extract(spectune.adapt(Plain(), "lora:rank=2", ["out"])).layers["out"]
    name = "encoder.rel_pos_bias"
    with pytest.raises(spectune.SpectuneError, match=f"no effect on '{name}'"):
        spectune.attach(layoutlmv3(), spectune.Adapter({name: term}))


def test_a_tied_output_embedding_is_asked_though_the_input_embedding_reads_its_weight():
    model = tiny.llama(tie_word_embeddings=True)
    spectune.adapt(model, "lora:rank=2", ["lm_head"])
    model(**tiny.batch("llama")).loss.backward()
    assert model.lm_head.adapters["default"][0].B.grad is not None


def test_an_embedding_in_whose_place_another_is_called_is_refused():
    with pytest.raises(spectune.SpectuneError, match=r"on 'shared'.*calls 'encoder\.embed_tokens'.* same weight"):
        spectune.adapt(tiny.t5(), "lora:rank=2", ["shared", "q"])
    model = spectune.adapt(tiny.t5(), "lora:rank=2", ["encoder.embed_tokens", "decoder.embed_tokens"])
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_fused_layer_whose_projections_are_adapted_is_told_as_what_it_is():
    model = spectune.adapt(tiny.gpt2(), "lora:rank=2", ["c_attn"], split="auto")
    for p in model.parameters():
        p.data += 0.1 if p.requires_grad else 0
    with pytest.raises(spectune.SpectuneError, match="would be adapted as one layer"):
        spectune.adapt(model, "lora:rank=2", ["c_attn"], name="other")

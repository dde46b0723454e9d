"""Merging: what is folded in, what it refuses, the way back, and ties that transformers writes and reads."""

import copy

import pytest
import torch
import torch.nn as nn
import transformers as tf

import spectune
import tiny
from spectune.layers.adapted import adapted_layers


def shaken(model, *names, by=0.2):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".adapters.{wanted}." in name for wanted in names or ("default",)):
                parameter.add_(by * torch.randn_like(parameter))
    return model


def two():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))
    spectune.adapt(model, "lora:rank=2", name="a")
    spectune.adapt(model, "dora:inner=svf", name="b")
    return shaken(model, "a", "b")


@pytest.mark.parametrize("chosen", ["a", ["b"], ["a", "b"], {"a": 0.5, "b": -1.0}, {"a": {"0": 2.0}}, None])
def test_what_is_named_is_folded_in_and_taken_out_bit_for_bit(chosen):
    model, x = two(), torch.randn(7, 6)
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    live = model(x)
    as_choice = dict.fromkeys(chosen, 1.0) if isinstance(chosen, list) else chosen
    expected = spectune.activate(copy.deepcopy(model), as_choice)(x) if chosen is not None else live
    spectune.merge(model, chosen)
    assert not adapted_layers(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight"}
    torch.testing.assert_close(model(x), expected)
    again = copy.deepcopy(model)
    assert spectune.unmerge(model) is model
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == {
        n: (i, g) for n, (i, _, g) in before.items()
    }
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert torch.equal(model(x), live)
    assert torch.equal(spectune.unmerge(again)(x), live)
    spectune.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_way_back_is_refused_where_it_would_lose_something():
    with pytest.raises(spectune.SpectuneError, match="none was merged"):
        spectune.unmerge(two())
    with pytest.raises(spectune.SpectuneError, match="keep=False"):
        spectune.unmerge(spectune.merge(two(), keep=False))
    with pytest.raises(spectune.SpectuneError, match="'2' was adapted again"):
        spectune.unmerge(spectune.adapt(spectune.merge(two()), "svf", ["2"]))
    model = spectune.merge(two())
    model[2].weight.data.add_(1e-3)
    with pytest.raises(spectune.SpectuneError, match="the merged weight of '2' is another one now"):
        spectune.unmerge(model)


def test_a_broken_adapter_is_not_merged_unless_asked_to_and_nothing_is_changed():
    model = two()
    model[2].adapters["a"][0].B.data[1] = float("inf")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(spectune.SpectuneError, match="merging 'a' into '2' gives values that are not finite"):
        spectune.merge(model, "a")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    spectune.merge(copy.deepcopy(model), "b")
    assert not spectune.merge(model, "a", safe=False)[2].weight.isfinite().all()
    with pytest.raises(spectune.SpectuneError, match="no adapter 'c'"):
        spectune.merge(two(), "c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neither_autocast_nor_inference_mode_touches_what_is_merged(dtype):
    model = shaken(spectune.adapt(tiny.qwen3(), "svf"))
    expected = copy.deepcopy(model)
    spectune.merge(expected)
    with torch.autocast("cpu", dtype), torch.inference_mode():
        spectune.merge(model)
    for merged, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(merged, right)
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
    ],
)
def test_a_weight_that_is_computed_answers_and_is_merged_into_with_a_sentence(norm):
    model, x = nn.Sequential(norm(nn.Linear(6, 6))).eval(), torch.randn(2, 6)
    before = model(x)
    spectune.adapt(model, "svf")
    torch.testing.assert_close(model(x), before)
    with pytest.raises(spectune.SpectuneError, match="the weight of '0' is computed from other parameters"):
        spectune.merge(model)
    torch.testing.assert_close(spectune.detach(model)(x), before)


def kinds():
    """Return tied models by name: a configuration's flag for all pairs, one for two models, one that the pass asks."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40, "pad_token_id": 1}
    small |= {"decoder_start_token_id": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 2}
    t5 = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    return {
        "plbart": lambda: tf.PLBartForConditionalGeneration(tf.PLBartConfig(**small)),
        "blenderbot-small": lambda: tf.BlenderbotSmallForConditionalGeneration(tf.BlenderbotSmallConfig(**small)),
        "mvp": lambda: tf.MvpForConditionalGeneration(tf.MvpConfig(**small)),
        "whisper": lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**small, max_target_positions=32, num_mel_bins=8, max_source_positions=8)
        ),
        "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(**t5, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
        ),
        "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**t5)),
        "gemma": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**tiny.TEXT, head_dim=8, query_pre_attn_scalar=8)),
        "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**tiny.BERT, embedding_size=32)),
    }  # fmt: skip


def answer(model):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    sound = (
        {"input_features": torch.linspace(-1, 1, 128).reshape(1, 8, 16)}
        if "Whisper" in type(model).__name__
        else {"input_ids": ids}
    )
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**sound, **decoder).logits


@pytest.mark.parametrize("kind", kinds())
def test_a_merged_tied_model_is_written_and_read_as_it_is(kind, tmp_path):
    model = kinds()[kind]().eval()
    flag, before = model.config.tie_word_embeddings, answer(model)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    table = model.get_input_embeddings().weight
    tied = {n for n, p in model.named_parameters(remove_duplicate=False) if p is table}
    assert f"{head}.weight" in tied
    live = answer(shaken(spectune.adapt(model, "lora:rank=2", [head])))
    assert not torch.allclose(live, before)
    spectune.merge(model)
    torch.testing.assert_close(answer(model), live, rtol=1e-4, atol=1e-4)
    still = {n for n, p in model.named_parameters(remove_duplicate=False) if p is table}
    assert still == tied - {f"{head}.weight"}
    model.tie_weights()  # as resizing the embeddings does
    torch.testing.assert_close(answer(model), live, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert torch.equal(answer(loaded.eval()), answer(model))
    spectune.detach(spectune.unmerge(model))
    assert torch.equal(answer(model), before)
    assert model.config.tie_word_embeddings == flag
    assert {n for n, p in model.named_parameters(remove_duplicate=False) if p is table} == tied

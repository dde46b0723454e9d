"""Tied weights: saved with their ties, and untied by merging alone."""

import copy

import pytest
import torch
import transformers as tf

import spectune
import tiny
from layers.test_stored import logits, tied, trained
from model.test_merging import shaken


def test_a_merged_model_is_saved_and_loaded_with_its_ties(tmp_path):
    model = trained(tied())
    expected = logits(model)
    spectune.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_adapter_on_the_tied_head_unties_it_only_by_merging(tmp_path):
    model = tied()
    plain, embedding = logits(model), model.model.embed_tokens.weight
    trained(model, ["lm_head", "q_proj"])
    assert model.lm_head.weight is embedding
    expected = logits(model)
    assert not torch.allclose(expected, plain)
    spectune.detach(copy.deepcopy(model))
    assert torch.equal(logits(model), expected)
    before = embedding.detach().clone()
    spectune.merge(model)
    assert torch.equal(embedding, before)
    assert model.lm_head.weight is not model.model.embed_tokens.weight is embedding
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


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

"""Tiny random models of every architecture, and a batch for each."""

from typing import Any

import torch
import transformers as tf

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BERT = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}


def llama(**changes):
    return _make(tf.LlamaForCausalLM, tf.LlamaConfig(**{**TEXT, **changes}))


def qwen3():
    return _make(tf.Qwen3ForCausalLM, tf.Qwen3Config(**TEXT, head_dim=8))


def gemma3():
    config = tf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    return _make(tf.Gemma3ForCausalLM, config)


def mistral():
    return _make(tf.MistralForCausalLM, tf.MistralConfig(**TEXT, head_dim=8, sliding_window=16))


def mixtral():
    config = tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return _make(tf.MixtralForCausalLM, config)


def phi3():
    return _make(tf.Phi3ForCausalLM, tf.Phi3Config(**TEXT))


def gpt2():
    config = tf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None
    )
    return _make(tf.GPT2LMHeadModel, config)


def bert():
    return _make(tf.BertForMaskedLM, tf.BertConfig(**BERT))


def roberta():
    return _make(tf.RobertaForSequenceClassification, tf.RobertaConfig(**BERT, num_labels=3))


def deberta():
    config = tf.DebertaV2Config(
        **BERT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        num_labels=3,
    )
    return _make(tf.DebertaV2ForSequenceClassification, config)


def t5():
    config = tf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    config.eos_token_id = None
    return _make(tf.T5ForConditionalGeneration, config)


def vit():
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    config.num_labels = 3
    return _make(tf.ViTForImageClassification, config)


def clip():
    shared: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tf.CLIPTextConfig(**shared, vocab_size=96, max_position_embeddings=64, eos_token_id=2)
    vision = tf.CLIPVisionConfig(**shared, image_size=16, patch_size=8)
    config = tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return _make(tf.CLIPModel, config)


ARCHITECTURES = {
    build.__name__: build
    for build in (llama, qwen3, gemma3, mistral, mixtral, phi3, gpt2, bert, roberta, deberta, t5, vit, clip)
}


def batch(architecture: str) -> dict[str, Any]:
    """Return inputs, with what the model needs to give a loss."""
    ids = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(3))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    if architecture == "vit":
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    if architecture == "clip":
        ids[:, -1] = 2
        return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}
    if architecture in ("roberta", "deberta"):
        return {"input_ids": ids, "labels": torch.tensor([0, 2])}
    return {"input_ids": ids, "labels": ids}


def _make(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # weights large enough for every layer to matter
            if parameter.dim() > 1 and "norm" not in name.lower():
                parameter.mul_(4)
    return model

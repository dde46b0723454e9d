"""Trained parameters equal the papers', from published shapes and from models on the meta device."""

import pytest
import torch
import transformers as tf

import spectune
from spectune import SVF, SVFT, DoRA, LoRA, LoRAXS

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QKVUD = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def llama(**sizes):
    return tf.LlamaConfig(vocab_size=8, **sizes), tf.LlamaForCausalLM


def gemma_2b():
    config = tf.GemmaConfig(
        vocab_size=8,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    return config, tf.GemmaForCausalLM


def mistral_7b():
    config = tf.MistralConfig(
        vocab_size=8,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return config, tf.MistralForCausalLM


def llama3_8b():
    return llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8)


def llama_7b():
    return llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)


def roberta_base():
    return tf.RobertaConfig(vocab_size=8), tf.RobertaModel


CASES = [
    (llama3_8b, SVF(), MLP, 393_216),
    (gemma_2b, SVFT(), ALL, 193_536),
    (gemma_2b, SVFT(pattern="random", width=16), ALL, 6_352_416),  # the paper: 6.35M
    (gemma_2b, SVFT(pattern="banded", width=16), ALL, 6_352_416),
    (gemma_2b, LoRA(rank=32), QKVUD, 26_247_168),  # 26.2M
    (mistral_7b, LoRAXS(rank=64), ALL, 917_504),  # 0.92M
    (mistral_7b, LoRA(rank=64), ALL, 167_772_160),  # 168M
    (llama_7b, DoRA(LoRA(rank=16)), QKVUD, 28_925_952),
    (llama_7b, DoRA(LoRA(rank=32)), QKVUD, 56_975_360),
    (roberta_base, LoRA(rank=8), ["query", "value"], 294_912),
]


@pytest.mark.parametrize(("build", "method", "targets", "expected"), CASES)
def test_counts_on_the_meta_device(build, method, targets, expected):
    config, cls = build()
    with torch.device("meta"):
        model = cls(config)
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith(tuple(targets))]
    assert sum(method.parameter_count(*shape) for shape in shapes) == expected
    spectune.adapt(model, method, targets)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(("rank", "percent"), [(16, 0.43), (32, 0.84)])
def test_dora_on_llama_7b_is_the_papers_share(rank, percent):
    method, base = DoRA(LoRA(rank=rank)), 6_738_415_616
    shapes = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]
    trained = 32 * sum(method.parameter_count(*shape) for shape in shapes)
    assert round(100 * trained / (base + trained), 2) == percent

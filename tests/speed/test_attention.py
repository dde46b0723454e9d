"""Attention within the examples of a packed row equals attention under the block-diagonal mask."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

import spectune
from spectune.layers.adapted import adapted_layers
from spectune.speed.attention import NAME, packed_attention
from spectune.speed.checkpointing import checkpoint_activations, keep_activations
from spectune.speed.shapes import STEP
from spectune.training.data.packing import Packer
from spectune.training.tasks.sft import encode
from training.folder import make_model, make_tokenizer

RECORDS = [
    {"prompt": "one plus two is", "completion": "three"},
    {"text": "ahoy"},
    {"prompt": "say", "completion": "hello and ahoy and hello"},
]


def run(model, batch):
    inputs = {k: v for k, v in batch.items() if "labels" not in k}
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_logits_and_gradients_are_those_of_the_mask(checkpointing, sharing):
    model = make_model(num_key_value_heads=4 // sharing).double().train()
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    masked = run(model, Packer(model, 0)(examples))
    with packed_attention(model):
        batch = Packer(model, 0)(examples)
        assert batch["cu_seq_lens_q"].tolist()[-1] == batch["input_ids"].shape[1]
        each = run(model, batch)
        padded = Packer(model, 0)._padded(examples)
        tokens = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    torch.testing.assert_close(each, masked)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(tokens, model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits)


class Attentions(TorchDispatchMode):
    """Count calls of fused attention, and collect the dtypes of what it is given."""

    def __init__(self):
        super().__init__()
        self.count, self.dtypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.count += 1
            self.dtypes |= {t.dtype for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packs", [True, False])
def test_a_model_in_bf16_learns_through_attention_in_fp32(packs):
    model = make_model().bfloat16().train()
    collate = Packer(model, 0)
    with packed_attention(model):
        examples = encode(RECORDS, make_tokenizer(), 32).examples
        inputs = collate(examples) if packs else collate._padded(examples)
        inputs.pop("labels")
        with Attentions() as learning:
            logits = model(**inputs, use_cache=False).logits
        with torch.no_grad(), Attentions() as answering:
            model(**inputs, use_cache=False)
    assert learning.dtypes == {torch.float32}
    assert answering.dtypes == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16
    exact = model.float()(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.05)


def test_where_it_would_differ_nothing_changes():
    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=4,
        )
    )
    eager = make_model()
    eager.set_attn_implementation("eager")
    for model in (windowed, eager):
        before = model.config._attn_implementation
        with packed_attention(model):
            assert model.config._attn_implementation == before != NAME
            assert "cu_seq_lens_q" not in Packer(model, 0)(encode(RECORDS, make_tokenizer(), 32).examples)


def test_long_rows_are_filled_up_to_a_few_lengths_where_the_processor_makes_kernels_for_each():
    words = ["one", "two", "three", "and", "hello"]
    records = [{"text": " ".join([words[i % 5], words[i // 5], *words * 5])} for i in [*range(14), 0]]
    examples = encode(records, make_tokenizer(), 64).examples
    model = make_model().bfloat16()
    with packed_attention(model):
        filled = Packer(model, 0)(examples)
        exact = Packer(make_model(), 0)(examples)
        assert filled["input_ids"].shape[1] % STEP == 0
        tokens = sum(len(example.tokens) for example in examples)
        assert filled["cu_seq_lens_k"][-1] == exact["cu_seq_lens_k"][-1] == tokens
        assert filled["cu_seq_lens_q"][-1] == exact["input_ids"].shape[1] < filled["input_ids"].shape[1] < tokens
        labels = filled.pop("labels")
        logits = model.float()(**filled, use_cache=False).logits
    exact.pop("labels")
    torch.testing.assert_close(logits, model(**exact, use_cache=False).logits, atol=1e-4, rtol=1e-3)
    assert logits.shape[1] == labels.numel()


def test_a_region_keeps_attention_and_its_gradients_to_the_last_bit():
    model = make_model(num_hidden_layers=2).train()
    spectune.adapt(model, "lora:rank=2")
    with torch.no_grad():
        for parameter in adapted_layers(model)["model.layers.0.self_attn.v_proj"].adapters.parameters():
            parameter.add_(0.1)
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    found = {}
    for how in (False, "selective", True):
        checkpoint_activations(model, how)
        with packed_attention(model):
            batch = Packer(model, 0)(examples)
            with Attentions() as attentions:
                logits, gradients = run(model, batch)
        found[how] = attentions.count, logits, *gradients.values()
        if how:
            keep_activations(model)
    assert [found[how][0] for how in (False, "selective", True)] == [6, 6, 12]  # of two layers for three examples
    assert all(torch.equal(a, b) for a, b in zip(found[False][1:], found["selective"][1:], strict=True))

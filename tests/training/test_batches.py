"""Packed, padded and single examples have one loss."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from spectune.training.attention import packed_attention
from spectune.training.batches import IGNORE, Packer
from spectune.training.rollout import shares_prompts
from spectune.training.tasks.sft import encode
from tiny import ARCHITECTURES, TEXT
from training.folder import make_model, make_tokenizer

RECORDS = [
    {"prompt": "one plus two is", "completion": "three"},
    {"text": "ahoy"},
    {"prompt": "say", "completion": "hello and ahoy and hello"},
    {"prompt": "what is the one", "completion": "a two"},
]


def losses(model, batch):
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")


def test_the_loss_of_a_packed_batch_equals_that_of_each_alone_and_of_the_padded_batch():
    tokenizer, model = make_tokenizer(), make_model().eval()
    examples = encode(RECORDS, tokenizer, 32).examples
    packer = Packer(model, 0)
    packed = losses(model, packer(examples))
    alone = torch.cat([losses(model, packer([example])) for example in examples])
    padded = losses(model, packer._padded(examples))
    assert len(packed) == sum(sum(e.supervised[1:]) for e in examples)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, padded[padded != 0], atol=1e-5, rtol=1e-5)


def test_a_batch_has_no_padding_and_logits_only_where_the_loss_is():
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    model = make_model()
    batch = Packer(model, 0)(examples)
    assert batch["input_ids"].shape == (1, sum(len(e.tokens) for e in examples))
    logits = model(**{k: v for k, v in batch.items() if "labels" not in k}, use_cache=False).logits
    assert logits.shape[1] == batch["labels"].numel()


def test_a_model_without_logits_to_keep_gets_a_padded_batch():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    examples = encode(RECORDS, make_tokenizer(), 32).examples
    batch = Packer(Plain(), 0)(examples)
    assert batch["input_ids"].shape == (4, max(len(e.tokens) for e in examples))
    assert int(batch["attention_mask"].sum()) == sum(len(e.tokens) for e in examples)


def lfm2():
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"]))


def recurrent_gemma():
    config = tf.RecurrentGemmaConfig(
        **TEXT, lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
    )
    return tf.RecurrentGemmaForCausalLM(config)


def qwen3_next():
    config = tf.Qwen3NextConfig(
        **TEXT,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    return tf.Qwen3NextForCausalLM(config)


def falcon():  # it takes positions, and makes no mask of them
    return tf.FalconForCausalLM(tf.FalconConfig(**TEXT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [lfm2, recurrent_gemma, qwen3_next, falcon])
def test_models_that_carry_something_from_example_to_example_are_padded(build, dtype):
    model = build().to(dtype).train()
    examples = encode(RECORDS, make_tokenizer(), 32).examples
    with packed_attention(model):
        packer = Packer(model, 0)
        assert not packer.packs
        assert not shares_prompts(model)
        assert model.training
        batched = losses(model.eval(), packer(examples))
        alone = torch.cat([losses(model, packer([example])) for example in examples])
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(batched[batched != 0], alone[alone != 0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "mixtral", "phi3", "gpt2"])
def test_models_that_attend_under_a_mask_are_packed(architecture, dtype):
    model = ARCHITECTURES[architecture]().to(dtype)
    before = torch.random.get_rng_state()
    assert Packer(model, 0).packs
    with packed_attention(model):
        assert Packer(model, 0).packs
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training

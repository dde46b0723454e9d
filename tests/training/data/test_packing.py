"""Packed, padded and single examples have one loss."""

from contextlib import nullcontext
from itertools import combinations, takewhile

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings

from spectune.speed.attention import packed_attention
from spectune.speed.shapes import IGNORE
from spectune.training.data.encoding import Example
from spectune.training.data.layout import Layout
from spectune.training.data.packing import Packer
from spectune.training.tasks.reinforce.rollout import shares_prompts
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


BEGINNINGS = [[], [4, 5, 6], list(range(3, 15)), [*range(3, 15), *range(20, 30)]]


def texts(draw):
    beginning = draw(st.sampled_from(BEGINNINGS))
    own = draw(st.lists(st.integers(3, 30), min_size=0 if len(beginning) > 1 else 2, max_size=12))
    tokens = [*beginning, *own]
    return Example(tokens, [*draw(st.lists(st.booleans(), min_size=len(tokens) - 1, max_size=len(tokens) - 1)), True])


@pytest.mark.parametrize("attends", ["eager", "sdpa", "packed"])
@settings(max_examples=20, deadline=None)
@given(examples=st.lists(st.composite(texts)(), min_size=1, max_size=6))
def test_what_examples_begin_with_in_common_is_computed_once_and_changes_nothing(attends, examples):
    model = make_model(num_key_value_heads=2).double().eval()
    if attends == "eager":
        model.set_attn_implementation("eager")
    with packed_attention(model) if attends == "packed" else nullcontext():
        packer = Packer(model, 0)
        assert packer.shares
        together = packer(examples)
        loss = losses(model, dict(together)).sum()
        found = torch.autograd.grad(loss, [*model.parameters()])
        alone = sum(losses(model, packer([example])).sum() for example in examples)
        expected = torch.autograd.grad(alone, [*model.parameters()])
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    tokens = [tuple(example.tokens) for example in examples]
    if "cu_seq_lens_k" in together:
        assert together["input_ids"].shape[1] < together["cu_seq_lens_k"][-1] == sum(map(len, tokens))
    else:
        shared = [
            sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(a, b, strict=False)))
            for a, b in combinations(tokens, 2)
        ]
        assert max(shared, default=0) <= 8  # of which the second example's last token has rows of its own


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "mixtral"])
def test_models_of_many_kinds_share_what_examples_begin_with(architecture):
    model = ARCHITECTURES[architecture]()
    examples = [Example([*range(3, 15), end, 4], [False] * 11 + [True] * 3) for end in (20, 21, 22)]
    for context in (nullcontext, lambda: packed_attention(model)):
        with context():
            packer = Packer(model, 0)
            batch = packer(examples)
            assert batch["input_ids"].shape == (1, 14 + 2 * 2)
            alone = torch.cat([losses(model, packer([example])) for example in examples])
            torch.testing.assert_close(losses(model, batch), alone, atol=1e-5, rtol=1e-5)


def test_where_attention_has_windows_or_rules_of_its_own_nothing_is_shared():
    kinds = [[["global", "local"], 1]]
    local = tf.GPTNeoConfig(vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, attention_types=kinds)
    for model in (ARCHITECTURES["gemma3"](), ARCHITECTURES["mistral"](), tf.GPTNeoForCausalLM(local)):
        assert not Packer(model, 0).shares

    class Deaf(tf.LlamaForCausalLM):  # to what its attention is told
        def forward(self, input_ids, position_ids, logits_to_keep, use_cache, **kwargs):
            return super().forward(input_ids, None, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

    routed = ARCHITECTURES["mixtral"]()
    routed.config.output_router_logits = True  # which makes something else of a mask, and fails
    for model in (Deaf(make_model().config), routed):
        packer = Packer(model, 0)
        assert packer.packs
        assert not packer.shares


def test_what_is_shared_does_not_count_towards_the_longest_row(monkeypatch):
    packer = Packer(make_model(), 0)
    examples = [Example([*range(3, 15), end], [False] * 12 + [True]) for end in range(20, 30)]
    monkeypatch.setattr("spectune.training.data.packing.PACKED_LIMIT", 12 + 10)
    assert packer(examples)["input_ids"].shape == (1, 22)
    assert packer([*examples, Example([4, 5], [True, True])])["input_ids"].shape == (11, 13)
    monkeypatch.setattr("spectune.training.data.packing._SEEN_LIMIT", 10 * 13 - 1)
    assert packer(examples)["input_ids"].shape == (10, 13)


def test_long_examples_share_only_what_is_worth_it():
    def rows(common, own):
        examples = [Example([*range(common), *range(end, end + own)], [True] * (common + own)) for end in (5000, 9000)]
        return Layout(examples, True).count

    assert rows(8, 40) == 8 + 2 * 40
    assert rows(7, 40) == 2 * 47
    assert rows(20, 980) == 2 * 1000
    assert rows(200, 800) == 200 + 2 * 800


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
        num_experts_per_tok=2,  # all: which one is the better is a matter of rounding
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

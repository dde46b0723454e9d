"""Places read from names."""

import pytest

import tiny
from spectune.methods import parse
from spectune.model.targets import resolve
from spectune.spectrum.names import is_embedding, override_names, places


def test_llama():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "model.layers.0.mlp.down_proj"]
    found = places(names)
    assert [(p.layer, p.kind) for p in found.values()] == [(0, "q_proj"), (11, "down_proj"), (0, "down_proj")]


def test_kinds_are_as_short_as_tells_them_apart():
    bert = ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense", "pooler.dense"]
    assert [p.kind for p in places(bert).values()] == ["attention.output.dense", "output.dense", "pooler.dense"]
    assert places(bert)["pooler.dense"].layer is None
    t5 = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    assert len({p.kind for p in places(t5).values()}) == 2


def test_experts_are_one_kind():
    names = [f"model.layers.2.block_sparse_moe.experts.{i}.w1" for i in range(3)]
    assert [(p.layer, p.kind, p.expert) for p in places(names).values()] == [(2, "w1", i) for i in range(3)]


def test_embeddings_and_heads():
    left_out = ["model.embed_tokens", "lm_head", "transformer.wte", "shared", "token_embd", "output", "embed_out"]
    assert all(map(is_embedding, [*left_out, "bert.embeddings.word_embeddings", "cls.predictions.decoder"]))
    kept = ["encoder.layer.0.output.dense", "model.layers.0.mlp.shared_expert.up_proj", "blk.0.attn_output", "score"]
    assert not any(map(is_embedding, kept))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_patterns_of_overrides_name_one_layer_each(architecture):
    model = tiny.ARCHITECTURES[architecture]()
    whole = resolve(model, parse("lora:rank=2"))
    without_prefix = [name.removeprefix("model.").removeprefix("transformer.") for name in whole]
    patterns = override_names(without_prefix)
    assert len(set(patterns.values())) == len(whole)
    for name, bare in zip(whole, without_prefix, strict=True):
        found = resolve(model, parse("lora:rank=2"), overrides={patterns[bare]: "lora:rank=3"})
        assert [n for n, method in found.items() if method.rank == 3] == [name]

"""Projections in a fused layer: whose rows are whose, and an adapter for each."""

import copy
import gc
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

import spectune
import tiny
from spectune import Adapter, LoRA, SpectuneError
from spectune.adapters.folder import CONFIG
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import effective_weight, find_linear, linear_layers
from spectune.layers.projections import Rows

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
FALCON: dict[str, Any] = {**SMALL, "bias": True}
MODELS: dict[str, Any] = {
    "gpt2": tiny.gpt2,
    "phi3": tiny.phi3,
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, intermediate_size=48)),
    "neox_japanese": lambda: tf.GPTNeoXJapaneseForCausalLM(tf.GPTNeoXJapaneseConfig(**SMALL)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=96)),
    "falcon_groups": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)
    ),
    "falcon_one_key": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON, multi_query=True)),
    "falcon_by_head": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON, multi_query=False)),
    "codegen": lambda: tf.CodeGenForCausalLM(
        tf.CodeGenConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=96, rotary_dim=4, n_positions=32)
    ),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=96)),
    "persimmon": lambda: tf.PersimmonForCausalLM(
        tf.PersimmonConfig(**SMALL, intermediate_size=48, qk_layernorm=False, pad_token_id=0)
    ),
    "bigcode_one_key": lambda: tf.GPTBigCodeForCausalLM(
        tf.GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=96, multi_query=True)
    ),
    "bigcode_by_head": lambda: tf.GPTBigCodeForCausalLM(
        tf.GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=96, multi_query=False)
    ),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**SMALL, intermediate_size=48, pad_token_id=0, global_attn_every_n_layers=1)
    ),
}
IDS = torch.arange(1, 15).reshape(2, 7)


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():  # large enough for attention to look somewhere
        if parameter.dim() > 1:
            parameter.mul_(4)
    return model


def move(model):
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


def parts_of(model, kind):
    """Return the rows of all fused layers that are one kind's, each with the parameter that they are rows of."""
    found = []
    for name, layer in linear_layers(model, split=True).items():
        if name.endswith(f".{kind}") and hasattr(layer, "rows"):
            fused: Any = layer.owner
            found.append((layer.rows, fused.weight.T if isinstance(fused, tf.pytorch_utils.Conv1D) else fused.weight))
            if fused.bias is not None:
                found.append((layer.rows, fused.bias))
    return found


def answers(model, zeroed, scrambled):
    model = copy.deepcopy(model)
    for rows, tensor in parts_of(model, zeroed):
        rows.put(tensor, torch.zeros_like(rows.of(tensor)))
    before = model(IDS).logits
    for rows, tensor in parts_of(model, scrambled):
        rows.put(tensor, torch.randn(rows.of(tensor).shape))
    return before, model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_queries_keys_and_values(name):
    model = made(name)
    parts = {n: rows for n, layer in linear_layers(model, split=True).items() if (rows := getattr(layer, "rows", None))}
    fused = {n.rpartition(".")[0] for n in parts}
    for layer in fused:  # every row is one part's
        mine = [rows for n, rows in parts.items() if n.rpartition(".")[0] == layer]
        total = len(effective_weight(find_linear(model, layer)))
        taken = torch.cat([rows.of(torch.arange(total)) for rows in mine])
        assert taken.sort().values.tolist() == list(range(total))
    # what attends to nothing is told by no key and no query, and what brings nothing by neither
    for zeroed, scrambled in (("q_proj", "k_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("v_proj", "k_proj")):
        torch.testing.assert_close(*answers(model, zeroed, scrambled))
    assert not torch.allclose(*answers(model, "nothing", "k_proj"))
    assert not torch.allclose(*answers(model, "q_proj", "v_proj"))


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
def test_halves_of_a_gated_mlp(name):
    model = made(name)
    assert parts_of(model, "gate_proj")
    for zeroed, scrambled in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        torch.testing.assert_close(*answers(model, zeroed, scrambled))


@pytest.mark.parametrize(
    "method", ["lora:rank=2", "svf", "pissa:rank=2", "dora:inner=lora,rank=2", "svft", "lora_xs:rank=2"]
)
@pytest.mark.parametrize("name", ["gpt2", "phi3", "neox", "falcon_groups"])
def test_each_part_has_its_own_adapter_that_merges_and_is_saved(name, method, tmp_path):
    base = made(name)
    expected = base(IDS).logits
    model = spectune.adapt(copy.deepcopy(base), method, split="auto")
    if not method.startswith("lora_xs"):  # which starts a little off
        torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-4)
    move(model)
    moved = model(IDS).logits
    moved.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".adapters." in n)
    assert not torch.allclose(moved, expected, atol=1e-3)

    adapter = spectune.extract(model)
    adapter.save(tmp_path / "own")
    again = spectune.attach(copy.deepcopy(base), Adapter.load(tmp_path / "own"))
    torch.testing.assert_close(again(IDS).logits, moved)
    with spectune.fused(again), torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, moved, atol=1e-4, rtol=1e-4)
    rows = {n.rpartition(".")[0] for n, layer in adapter.layers.items() if layer.rows}
    for fused in rows:  # W' of the fused layer, put together from the parts' dense updates
        W = effective_weight(find_linear(base, fused)).clone()
        for n, layer in adapter.layers.items():
            if layer.rows and n.rpartition(".")[0] == fused:
                layer.rows.put(W, layer.rows.of(W) + adapter.delta(n).to(W))
        merged = spectune.merge(copy.deepcopy(again))
        torch.testing.assert_close(effective_weight(find_linear(merged, fused)), W, atol=1e-5, rtol=1e-4)
    spectune.merge(again)
    torch.testing.assert_close(again(IDS).logits, moved, atol=1e-4, rtol=1e-4)
    assert again.state_dict().keys() == base.state_dict().keys()
    spectune.unmerge(again)
    torch.testing.assert_close(again(IDS).logits, moved)
    spectune.detach(again)
    assert torch.equal(again(IDS).logits, expected)
    assert {type(m) for m in again.modules()} == {type(m) for m in base.modules()}


def test_a_part_has_the_singular_values_of_its_own_rows():
    base = made("neox")
    model = spectune.adapt(copy.deepcopy(base), "svf", ["k_proj"], split="auto")
    ((name, layer),) = adapted_layers(model).items()
    assert name == "gpt_neox.layers.0.attention.query_key_value.k_proj"
    own = base.gpt_neox.layers[0].attention.query_key_value.weight.view(4, 3, 8, 32)[:, 1].reshape(32, 32)
    (basis,) = layer.bases.values()
    torch.testing.assert_close(basis.tensors()["S"], torch.linalg.svdvals(own))


def test_targets_name_a_part_or_the_layer_around_it():
    names = list(adapted_layers(spectune.adapt(made("gpt2"), LoRA(rank=2), ["q_proj", "c_fc"], split="auto")))
    assert [n.removeprefix("transformer.h.0.") for n in names[:2]] == ["attn.c_attn.q_proj", "mlp.c_fc"]
    assert len(adapted_layers(spectune.adapt(made("gpt2"), LoRA(rank=2), ["c_attn"], split="auto"))) == 6
    assert len(adapted_layers(spectune.adapt(made("gpt2"), LoRA(rank=2), ["c_attn"]))) == 2


def test_one_part_alone_leaves_the_others_the_bases(tmp_path):
    base = made("phi3")
    model = spectune.adapt(copy.deepcopy(base), "lora:rank=2", ["k_proj"], split="auto")
    move(model)
    moved = model(IDS).logits
    spectune.merge(model)
    torch.testing.assert_close(model(IDS).logits, moved, atol=1e-5, rtol=1e-4)
    fused, plain = (m.model.layers[0].self_attn.qkv_proj.weight for m in (model, base))
    assert torch.equal(fused[:32], plain[:32])
    assert not torch.equal(fused[32:48], plain[32:48])
    assert torch.equal(fused[48:], plain[48:])


def test_rows_of_a_batch_have_adapters_of_their_own():
    model = made("gpt2")
    for name in ("a", "b"):
        spectune.adapt(model, "svf", name=name, split="auto")
        move(model)
    alone = []
    with torch.no_grad():
        for row, name in zip(IDS, ("a", "b"), strict=True):
            spectune.activate(model, name)
            alone.append(model(row[None]).logits)
        with spectune.route(model, ["a", "b"]):
            torch.testing.assert_close(model(IDS).logits, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_compiled_model_answers_alike_without_a_graph_break():
    model = spectune.adapt(made("gpt2"), "lora:rank=2", ["k_proj", "v_proj"], split="auto")
    move(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


def test_copies_pickles_and_the_state_of_a_model_that_is_saved(tmp_path):
    base = made("gpt2")
    model = spectune.adapt(copy.deepcopy(base), "lora:rank=2", split="auto")
    move(model)
    moved = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IDS).logits, moved)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(tf.GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, moved, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_loras_of_parts_are_exported_as_one_of_the_fused_layer(name, tmp_path):
    from peft import PeftModel

    base = made(name)
    model = spectune.adapt(copy.deepcopy(base), "lora:rank=2,alpha=3", split="auto")
    move(model)
    spectune.extract(model).export(tmp_path / "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft"))
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["r"] in (2, 6)


def test_a_layer_is_adapted_as_one_or_in_parts():
    model = spectune.adapt(made("gpt2"), "lora:rank=2", ["c_attn"], split="auto")
    with pytest.raises(SpectuneError, match=r"'transformer\.h\.0\.attn\.c_attn' would be adapted as one layer"):
        spectune.adapt(model, "lora:rank=2", ["c_attn", "c_fc"], name="whole")
    model = spectune.adapt(made("gpt2"), "lora:rank=2", ["c_attn"])
    with pytest.raises(SpectuneError, match=r"'transformer\.h\.0\.attn\.c_attn' would be adapted as one layer"):
        spectune.adapt(model, "lora:rank=2", split="auto", name="parts")
    with pytest.raises(SpectuneError, match="split must be 'auto' or None, not 'qkv'"):
        spectune.adapt(made("gpt2"), "lora:rank=2", split="qkv")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((32, 32, 96, 1), "is other rows of the fused layer"),
        ((80, 32, 96, 1), "'rows' in"),
        ((0, 1, 96, 1), "'rows' in"),
    ],
)
def test_a_file_with_other_rows_is_refused(rows, said, tmp_path):
    adapter = spectune.extract(spectune.adapt(made("gpt2"), "svf", ["q_proj"], split="auto"))
    name = "transformer.h.0.attn.c_attn.q_proj"
    assert adapter.layers[name].rows == (0, 32, 96, 1)
    adapter.layers = {**adapter.layers, name: replace(adapter.layers[name], rows=Rows(*rows))}
    with pytest.raises(SpectuneError, match=said):  # rows that cannot be are not saved either
        spectune.attach(made("gpt2"), Adapter.load(adapter.save(tmp_path)))


def test_an_adapter_of_parts_holds_no_base():
    model = spectune.adapt(made("gpt2"), "svf", split="auto")
    adapter = spectune.extract(model)
    del model
    gc.collect()
    assert all(layer.weight is None for layer in adapter.layers.values())


def test_rows_are_read_and_written():
    rows, held = Rows(1, 2, 4, 3), torch.arange(12.0)
    assert rows.of(held).tolist() == [1, 2, 5, 6, 9, 10]
    rows.put(held, -rows.of(held))
    assert held.tolist() == [0, -1, -2, 3, 4, -5, -6, 7, 8, -9, -10, 11]

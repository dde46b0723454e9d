"""What scripts do with PEFT's LoRA, done with ours: lower-level calls, packed weights, replicas, states of the base."""

import copy

import peft
import pytest
import torch
import transformers as tf
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights

import spectune
import spectune.peft as sp
import tiny
from peft_cases import logits, moved, trained, x
from spectune.layers.packed import keep_layout

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
]


def new():
    return tiny.llama(initializer_range=0.2).eval()


def packed(folder, bits):
    pytest.importorskip("bitsandbytes")
    if not folder.exists():
        tiny.llama(initializer_range=0.2, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = tf.BitsAndBytesConfig(**(how if bits == 4 else {"load_in_8bit": True}))
    kind = tf.AutoModelForCausalLM
    return kind.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("bits", "config"), [(4, sp.SVFConfig()), (4, sp.SVFConfig(use_dora=True)), (8, sp.PiSSAConfig(r=4))]
)
def test_packed_weights(bits, config, tmp_path):
    def new():
        base = packed(tmp_path / "base", bits)
        keep_layout(base, True)  # where a processor has instructions for another, the base alone answers with that
        return base

    model = get_peft_model(new(), copy.deepcopy(config)).eval()
    assert torch.equal(logits(model), logits(new()))
    y = logits(moved(model))
    assert (y - logits(new())).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(new(), tmp_path / "adapter").eval()), y)
    assert torch.equal(logits(spectune.attach(new(), spectune.Adapter.load(tmp_path / "adapter")).eval()), y)
    with pytest.raises(spectune.SpectuneError, match=r"is packed .* keep the adapter beside it"):
        model.merge_adapter()
    assert torch.equal(logits(model), y)
    ready = get_peft_model(peft.prepare_model_for_kbit_training(new()), copy.deepcopy(config)).train()
    ready(input_ids=x, labels=x).loss.backward()
    assert all(bool(p.grad.any()) for p in ready.parameters() if p.requires_grad)


def test_layers_put_in_by_hand():
    model, other = new(), new()
    inject_adapter_in_model(sp.SVFConfig(target_modules=["q_proj"]), model, "one")
    inject_adapter_in_model(sp.SVFConfig(target_modules=["q_proj"]), other, "two")
    moved(model, "one")
    told = set_peft_model_state_dict(other, get_peft_model_state_dict(model, adapter_name="one"), adapter_name="two")
    assert not told.unexpected_keys
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(spectune.attach(new(), spectune.extract(model, "one"))), logits(model))


@pytest.mark.parametrize("low", [False, True])
def test_states_of_an_adapter(low, tmp_path):
    model, other = trained(new(), sp.SVFConfig()), trained(new(), sp.SVFConfig(), seed=2)
    there = [id(p) for p in model.parameters()]
    other.save_pretrained(tmp_path)
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path)), low_cpu_mem_usage=low)
    assert torch.equal(logits(model), logits(other))
    assert low or there == [id(p) for p in model.parameters()]  # values in place, as hotswapping has them
    state = {k: v[:3] if k.endswith("q_proj.svf_z") else v for k, v in get_peft_model_state_dict(other).items()}
    with pytest.raises((spectune.SpectuneError, RuntimeError), match="q_proj"):
        set_peft_model_state_dict(model, state)


def test_some_of_the_adapters_are_merged():
    model = trained(trained(new(), sp.SVFConfig(), "one"), sp.SVFConfig(), "two", 2)
    y = logits(model)
    assert torch.allclose(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["two"])), y, atol=1e-3)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert torch.allclose(logits(model.merge_and_unload(adapter_names=["one", "two"])), both, atol=1e-3)


def test_another_method_beside_it_is_for_mixed_models(tmp_path):
    trained(new(), sp.PiSSAConfig(r=4)).save_pretrained(tmp_path)
    model = trained(new(), sp.SVFConfig())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):  # as with PEFT's own
        model.load_adapter(tmp_path, "other")


@pytest.mark.skipif(not hasattr(peft, "set_base_model_state_dict"), reason="an earlier PEFT")
def test_states_of_the_base():
    model = trained(new(), sp.SVFConfig())
    y, state = logits(model), {k: v.clone() for k, v in peft.get_base_model_state_dict(model).items()}
    with torch.no_grad():
        for p in model.get_base_model().parameters():
            p += 0.1 if not p.requires_grad else 0
    peft.set_base_model_state_dict(model, state)
    assert torch.equal(logits(model), y)
    state["model.layers.0.mlp.up_proj.weight"] += 0.1
    with pytest.raises(spectune.SpectuneError, match=r"belongs to another base.*layers\.0\.mlp\.up_proj"):
        peft.set_base_model_state_dict(model, state)


@pytest.mark.parametrize(("auto", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_dtype_that_it_trains_in(auto, dtype, tmp_path):
    model = get_peft_model(new().to(torch.bfloat16), sp.SVFConfig(), autocast_adapter_dtype=auto)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    y = logits(moved(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(new().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=auto)
    assert torch.equal(logits(again), y)


def test_embeddings_that_were_resized_are_saved_beside_it(tmp_path):
    def resized():
        model = new()
        torch.manual_seed(1)
        model.resize_token_embeddings(100)
        return model

    model = trained(resized(), sp.SVFConfig())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path)), logits(model))
    assert torch.equal(logits(spectune.attach(resized(), spectune.Adapter.load(tmp_path))), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain, checkpointed = (get_peft_model(new().train(), sp.SVFConfig()) for _ in range(2))
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(input_ids=x, labels=x).loss.backward()
    grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in (plain, checkpointed)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))

"""PEFT's folders both ways, with what trains beside the factors: whole modules, rows, biases; ranks, the base."""

import copy
import json

import peft
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import spectune
import tiny
from spectune import Adapter, SpectuneError
from tiny import BERT, TEXT

IDS = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def llama(tied=False):
    return tiny.llama(tie_word_embeddings=tied).eval()


def gpt2():
    return tiny.gpt2().eval()


def bert():
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3)).eval()


def answer(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def moved(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


CASES = {
    "norm": (llama, {"modules_to_save": ["model.norm"]}, {"modules_to_save": ["norm"]}),
    "embedding": (llama, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}),
    "both embeddings": (
        llama,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "rows": (
        llama,
        {"trainable_token_indices": {"embed_tokens": [9, 4]}},
        {"modules_to_save": {"embed_tokens": [4, 9]}},
    ),
    "tied rows": (
        lambda: llama(True),
        {"trainable_token_indices": [9, 4]},
        {"modules_to_save": {"embed_tokens": [9, 4]}},
    ),
    "biases": (gpt2, {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}, {"bias": "all"}),
    "biases and modules": (
        bert,
        {"bias": "all", "target_modules": ["query"], "modules_to_save": ["classifier", "pooler", "LayerNorm"]},
        {"bias": "all", "modules_to_save": ["classifier", "pooler", "LayerNorm"]},
    ),
    "biases and a module with layers in it": (
        bert,
        {"bias": "all", "target_modules": ["value"], "modules_to_save": ["query", "output.dense"]},
        {"bias": "all", "modules_to_save": ["query", "output.dense"]},
    ),
    "biases of layers": (bert, {"bias": "lora_only", "target_modules": ["query"]}, {"bias": "lora_only"}),
    "square conv1d": (
        gpt2,
        {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"], "fan_in_fan_out": True},
        {"modules_to_save": ["attn.c_proj"]},
    ),
    "head": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query"]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_trained_is_read(tmp_path, case):
    base, theirs, _ = CASES[case]
    model = moved(get_peft_model(base(), LoraConfig(**{"target_modules": ["q_proj"], **theirs})))
    expected = answer(model)
    model.save_pretrained(tmp_path)
    if case == "biases of layers":  # which PEFT does not write
        expected = None
    loaded = Adapter.from_peft(tmp_path)
    ours = spectune.attach(base(), loaded)
    if expected is not None:
        close(answer(ours), expected)
        again = Adapter.load(spectune.extract(ours).save(tmp_path / "again"))
        close(answer(spectune.attach(base(), again)), expected)


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_is_trained_here(tmp_path, case):
    base, theirs, ours = CASES[case]
    targets = theirs.get("target_modules", ["q_proj"])
    model = moved(spectune.adapt(base(), "lora:rank=2", targets, **ours))
    spectune.extract(model).export(tmp_path)
    close(answer(PeftModel.from_pretrained(base(), tmp_path)), answer(model))
    close(answer(spectune.attach(base(), Adapter.load(tmp_path))), answer(model))


def test_a_bias_of_lora_is_read_and_written(tmp_path):
    theirs = moved(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2, lora_bias=True)))
    theirs.save_pretrained(tmp_path / "a")
    ours = spectune.attach(llama(), Adapter.from_peft(tmp_path / "a"))
    close(answer(ours), answer(theirs))
    spectune.extract(ours).export(tmp_path / "b")
    close(answer(PeftModel.from_pretrained(llama(), tmp_path / "b")), answer(theirs))


def test_embeddings_of_a_resized_model_are_read(tmp_path):
    def grown(seed):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(TEXT["vocab_size"] + 4)
        return model

    llama().save_pretrained(tmp_path / "base")
    theirs = get_peft_model(grown(1), LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = Adapter.from_peft(tmp_path / "adapter")
    assert adapter.modules.keys() == {"model.embed_tokens", "lm_head"}
    close(answer(spectune.attach(grown(2), adapter)), answer(theirs))
    with pytest.raises(SpectuneError, match=r"resize_token_embeddings\(100\)"):
        spectune.attach(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)


def test_a_head_without_the_layers_bias_is_written_with_it(tmp_path):
    model = moved(spectune.adapt(bert(), "lora:rank=2", ["query"], overrides={"classifier": spectune.Head(bias=False)}))
    spectune.extract(model).export(tmp_path)
    close(answer(PeftModel.from_pretrained(bert(), tmp_path)), answer(model))
    score = tiny.llama()
    spectune.adapt(score, "lora:rank=2", ["q_proj"], overrides={"lm_head": spectune.Head()})  # which has no bias
    assert "lm_head.adapters.default.0.h" not in score.state_dict()


def test_autopeft_opens_what_is_saved(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = moved(spectune.adapt(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "lora:rank=2", ["q_proj"]))
    spectune.extract(model).save(tmp_path / "adapter")
    for kind in (peft.AutoPeftModelForCausalLM, peft.AutoPeftModel):
        close(answer(kind.from_pretrained(tmp_path / "adapter")), answer(model))


def test_the_base_is_known_again_from_pefts_format(tmp_path):
    model = moved(spectune.adapt(llama(), "dora:inner=lora,rank=2", ["q_proj"]))
    spectune.extract(model).save(tmp_path)
    torch.manual_seed(9)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    with pytest.raises(SpectuneError, match=r"another base: the weight of 'model.layers.0.self_attn.q_proj' differs"):
        spectune.attach(other, Adapter.load(tmp_path))
    spectune.attach(other, Adapter.load(tmp_path), check=False)
    spectune.attach(llama().to(torch.bfloat16), Adapter.load(tmp_path))


def test_one_rank_for_all_layers(tmp_path):
    overrides = {"v_proj": "lora:rank=1,alpha=3", "o_proj": "lora:rank=3"}
    model = moved(spectune.adapt(llama(), "lora:rank=2,rslora=false", overrides=overrides))
    spectune.extract(model).export(tmp_path, one_rank=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})
    assert {t.shape[0] for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in k} == {3}
    close(answer(PeftModel.from_pretrained(llama(), tmp_path)), answer(model))


def test_pickled_tensors_are_read_on_request_and_nothing_else(tmp_path):
    theirs = moved(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(SpectuneError, match=r"adapter_model.bin, a pickle, .* allow_bin=True"):
        Adapter.from_peft(tmp_path)
    close(answer(spectune.attach(llama(), Adapter.from_peft(tmp_path, allow_bin=True))), answer(theirs))
    torch.save({"a": copy.copy}, tmp_path / "adapter_model.bin")
    with pytest.raises(SpectuneError, match="cannot be read as tensors alone"):
        Adapter.from_peft(tmp_path, allow_bin=True)


def test_what_is_not_finite_is_not_saved(tmp_path):
    adapter = spectune.extract(spectune.adapt(llama(), "svf", ["q_proj"]))
    adapter.save(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    next(iter(adapter.layers.values())).terms[0].trained["z"][0] = torch.inf
    with pytest.raises(SpectuneError, match=r"cannot be saved: '.*z' has values that are not finite"):
        adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before

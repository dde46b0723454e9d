"""`target_parameters`: every expert of a tensor as a layer, in PEFT."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, convert_to_lora, get_peft_model

import spectune
import spectune.peft as sp
from peft_cases import kinds, logits, trained, x

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 96, "initializer_range": 0.2, "num_local_experts": 4}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral():
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_experts_per_tok=2)).eval()


def gpt_oss():
    torch.manual_seed(0)
    return tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, head_dim=8, num_experts_per_tok=2)).eval()


def llama4():
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**sizes, num_experts_per_tok=1)).eval()


@pytest.mark.parametrize("new", [mixtral, gpt_oss, llama4])  # the last two hold W (in x out)
@pytest.mark.parametrize(
    "config",
    [
        sp.SVFConfig(target_modules=["q_proj"], target_parameters=EXPERTS),
        sp.LoRAXSConfig(r=2, target_modules=[], target_parameters=EXPERTS[1:], use_dora=True),
    ],
    ids=["svf", "lora_xs"],
)
def test_the_experts_of_a_tensor(new, config, tmp_path):
    model = trained(new(), config)
    y = logits(model)
    assert (y - logits(new())).abs().max() > 0.1
    state = new().state_dict()
    model.save_pretrained(tmp_path / "peft")
    ours = spectune.Adapter.load(tmp_path / "peft")
    assert len([name for name in ours.layers if ".experts." in name]) == 2 * 4 * len(config.target_parameters)
    assert torch.equal(logits(spectune.attach(new(), ours)), y)
    ours.save(tmp_path / "ours")
    for folder in ("peft", "ours"):
        assert torch.equal(logits(PeftModel.from_pretrained(new(), tmp_path / folder)), y)
    plain = new()
    plain.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(logits(plain), y)
    model.merge_adapter()
    assert torch.allclose(logits(model), y, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(new()))
    merged = copy.deepcopy(model).merge_and_unload()
    assert kinds(merged) == kinds(new())
    assert torch.allclose(logits(merged), y, atol=1e-4)
    plain = model.unload()
    assert kinds(plain) == kinds(new())
    assert all(torch.equal(tensor, state[key]) for key, tensor in plain.state_dict().items())


def test_several_adapters_on_experts():
    config = sp.SVFConfig(target_modules=["q_proj"], target_parameters=EXPERTS)
    model = trained(trained(mixtral(), config, "one"), config, "two", seed=2)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with torch.no_grad():
        rows = model(x.repeat(2, 1)[:3], adapter_names=["two", "__base__", "one"]).logits
    torch.testing.assert_close(
        rows, torch.stack([alone["two"][0], logits(mixtral())[1], alone["one"][0]]), atol=1e-4, rtol=1e-4
    )
    model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "sum")
    model.set_adapter("sum")
    a, b = (spectune.extract(model, name) for name in ("one", "two"))
    assert torch.allclose(logits(model), logits(spectune.attach(mixtral(), 0.7 * a - 0.3 * b)), atol=1e-4)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), alone["two"])


def test_they_train_as_ours_do():
    theirs = get_peft_model(mixtral().train(), sp.SVFConfig(target_modules=[], target_parameters=EXPERTS))
    ours = spectune.adapt(mixtral().train(), spectune.SVF(), targets=["gate_up_proj", "down_proj"])
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]


def test_what_is_no_tensor_of_experts_is_told():
    with pytest.raises(spectune.SpectuneError, match=r"q_proj\.weight' is a parameter of Linear, .* target_modules"):
        get_peft_model(mixtral(), sp.SVFConfig(target_modules=[], target_parameters=["0.self_attn.q_proj.weight"]))
    model = trained(mixtral(), sp.LoRAXSConfig(r=2, target_parameters=EXPERTS))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)

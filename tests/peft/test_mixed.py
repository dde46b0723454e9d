"""`PeftMixedModel`: a method of ours beside PEFT's LoRA, in either order."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model

import spectune
import spectune.peft as sp
import tiny
from peft_cases import kinds, logits, moved, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's


def new():
    return tiny.llama(initializer_range=0.2).eval()


def mixed(order, config):
    configs = {
        "lora": LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "ours": copy.deepcopy(config),
    }
    torch.manual_seed(0)
    model = get_peft_model(new(), configs[order[0]], adapter_name=order[0], mixed=True)
    model.add_adapter(order[1], configs[order[1]])
    model.set_adapter(list(order))
    return moved(model, "ours")


@pytest.mark.parametrize("order", [("lora", "ours"), ("ours", "lora")])
@pytest.mark.parametrize("config", [sp.SVFConfig(), sp.MiLoRAConfig(r=2, lora_dropout=0.0, target_modules=["q_proj"])])
def test_a_method_beside_lora(order, config):
    model = mixed(order, config)
    assert isinstance(model, PeftMixedModel)
    y = logits(model)
    alone = {}
    for name in order:
        model.set_adapter(name)
        alone[name] = logits(model)
        assert (alone[name] - y).abs().max() > 0.01
    expected = logits(trained(new(), config, "ours"))
    assert torch.allclose(alone["ours"], expected, atol=1e-3)
    model.set_adapter(list(order))
    assert torch.equal(logits(model), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(new()))
    model.merge_adapter()
    assert torch.allclose(logits(model), y, atol=1e-3)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), y, atol=1e-3)
    again = copy.deepcopy(model)
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged), y, atol=1e-3)
    assert kinds(merged) == kinds(new())
    model.delete_adapter("lora")
    model.set_adapter("ours")
    assert torch.allclose(logits(model), expected, atol=1e-3)
    plain = model.unload()
    assert kinds(plain) == kinds(new())
    assert torch.allclose(logits(plain), logits(new()), atol=1e-3)


def test_a_dora_is_not_merged_over_another(tmp_path):
    model = mixed(("ours", "lora"), sp.SVFConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(spectune.SpectuneError, match=r"without what is merged into it now: merge this adapter first"):
        model.merge_adapter()


def test_folders_open_beside_another_method_and_adapters_are_deleted(tmp_path):
    ours = trained(new(), sp.SVFConfig(target_modules=["q_proj"]), "ours")
    expected = logits(ours)
    ours.save_pretrained(tmp_path)
    model = PeftMixedModel.from_pretrained(new(), tmp_path / "ours", "ours").eval()
    assert torch.equal(logits(model), expected)
    torch.manual_seed(0)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.set_adapter(["ours", "lora"])
    assert (logits(model) - expected).abs().max() > 0.01
    model.delete_adapter("ours")
    assert model.active_adapters == ["lora"]
    lora = logits(model)
    assert (lora - expected).abs().max() > 0.01
    model.delete_adapter("lora")
    assert torch.equal(logits(model), logits(new()))

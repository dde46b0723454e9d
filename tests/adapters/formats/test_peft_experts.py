"""LoRA on experts in PEFT's format, both ways: `target_parameters`."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import spectune
import tiny
from spectune import Adapter, LoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),  # though they do
]
IDS = torch.arange(1, 19).reshape(2, 9)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def llama4() -> Any:
    config = tf.Llama4TextConfig(
        **tiny.TEXT,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
        attention_chunk_size=32,
    )
    model = tf.Llama4ForCausalLM(config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gpt_oss() -> Any:
    return tf.GptOssForCausalLM(tf.GptOssConfig(**tiny.TEXT, head_dim=8, num_local_experts=3, num_experts_per_tok=2))


MODELS = {"mixtral": tiny.mixtral, "gpt_oss": gpt_oss, "llama4": llama4}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def shaken(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj", "q_proj"], ["down_proj"]])
def test_peft_answers_as_we_do(name, targets, tmp_path):
    model = made(name)
    base = copy.deepcopy(model)
    spectune.adapt(
        model, LoRA(rank=3, alpha=5), targets=targets, exclude=r".*\.shared_expert\..*" if name == "llama4" else ()
    )
    shaken(model)
    adapter = spectune.extract(model)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    again = spectune.attach(base, Adapter.load(tmp_path))
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("parameters", [BOTH, ["experts.gate_up_proj"]])
def test_we_answer_as_peft_does(name, parameters, tmp_path):
    base = made(name)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=parameters, rank_pattern={"experts.gate_up_proj": 3}
    )
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path)
    adapter = Adapter.from_peft(tmp_path)
    assert len(adapter.layers) == 2 + 2 * len(base.model.layers[0].mlp.experts.gate_up_proj) * len(parameters)
    ours = spectune.attach(base, adapter)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-4)


def test_experts_of_different_ranks_are_filled_up(tmp_path):
    model = made("mixtral")
    base = copy.deepcopy(model)
    spectune.adapt(model, LoRA(rank=2), ["gate_up_proj"], rank_pattern={r"experts\.1\..*": 4})
    shaken(model)
    spectune.extract(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_what_peft_cannot_hold_is_ours_and_refused_by_name(tmp_path):
    model = spectune.adapt(made("mixtral"), LoRA(rank=2), [r"layers.0.mlp.experts.1.down_proj", "q_proj"])
    adapter = spectune.extract(shaken(model))
    adapter.save(tmp_path / "ours")
    attached = spectune.attach(made("mixtral"), Adapter.load(tmp_path / "ours"))
    assert torch.equal(attached(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"some of the experts of 'model\.layers\.0\.mlp\.experts\.down_proj' alone"):
        adapter.export(tmp_path / "peft")
    spectune.adapt(other := made("mixtral"), "svf", ["down_proj"])
    shaken(other)
    spectune.extract(other).export(tmp_path / "svf")
    theirs = peft.PeftModel.from_pretrained(made("mixtral"), tmp_path / "svf")
    torch.testing.assert_close(theirs(IDS).logits, other(IDS).logits, atol=1e-5, rtol=1e-4)

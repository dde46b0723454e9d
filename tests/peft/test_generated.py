"""The configs that are made of a method's fields: VeRA's, AdaLoRA's, and those of methods from outside."""

import copy
import dataclasses
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

import spectune
import spectune.peft as sp
import tiny
from peft_cases import kinds, logits, trained, x
from spectune.methods import registry
from spectune.methods.vera import VeRA
from spectune.peft import register

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's


def new():
    return tiny.llama(initializer_range=0.2).eval()


@pytest.mark.parametrize(
    "config", [sp.VeRAConfig(r=4), sp.VeRAConfig(r=4, use_dora=True), sp.AdaLoRAConfig(r=2, rank_pattern={"q_proj": 3})]
)
def test_a_folder_opens_on_either_side(config, tmp_path):
    model = trained(new(), config)
    y = logits(model)
    model.save_pretrained(tmp_path / "peft")
    ours = spectune.Adapter.load(tmp_path / "peft")
    assert torch.equal(logits(spectune.attach(new(), ours)), y)
    ours.save(tmp_path / "ours")
    for folder in ("peft", "ours"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # nothing is missing
            again = PeftModel.from_pretrained(new(), tmp_path / folder)
        assert type(again.peft_config["default"]) is type(config)
        assert torch.equal(logits(again), y)
    plain = new()
    plain.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(logits(plain), y)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    merged = model.merge_and_unload()
    assert kinds(merged) == kinds(new())
    assert torch.allclose(logits(merged), y, atol=1e-3)


def test_fields_have_the_names_of_peft(tmp_path):
    config = sp.AdaLoRAConfig(r=3, lora_alpha=6, t_init=5, lora_dropout=0.1)
    assert config.method_for("", None) == spectune.AdaLoRA(rank=3, alpha=6, t_init=5, dropout=0.1)
    assert "\n        r: average rank" in sp.AdaLoRAConfig.__doc__
    config.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is sp.AdaLoRAConfig
    assert type(pickle.loads(pickle.dumps(config))) is sp.AdaLoRAConfig
    with pytest.raises(spectune.SpectuneError, match=r"beta1 of AdaLoRA must be a number"):
        sp.AdaLoRAConfig(beta1=2)
    with pytest.raises(spectune.SpectuneError, match=r"unexpected keyword argument 'd_init'; did you mean 'd_initial'"):
        sp.VeRAConfig(d_init=1)


def step(model, optimizer, count):
    for _ in range(count):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("low", [False, True])
def test_adalora_prunes_by_itself_and_goes_on_where_it_stopped(tmp_path, low):
    config = sp.AdaLoRAConfig(r=2, total_steps=8, t_init=1, t_final=2, interval=1, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(new().train(), config)
    optimizer = adamw(model)
    step(model, optimizer, 4)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, 4)
    again = PeftModel.from_pretrained(new().train(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    resumed = adamw(again)
    resumed.load_state_dict(state)
    step(again.train(), resumed, 4)
    ends = [{k: p for k, p in m.named_parameters() if "adalora_" in k} for m in (model, again)]
    assert all(torch.allclose(p, ends[1][key], atol=1e-6) for key, p in ends[0].items())
    kept = [int(p.count_nonzero()) for key, p in ends[0].items() if ".spectuneadalora_E." in key]
    assert sum(kept) == 2 * len(kept)
    assert set(spectune.Adapter.load(tmp_path).layers) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


@pytest.fixture
def outside(monkeypatch):
    """Return a method of somebody else's, known for this test."""
    monkeypatch.setattr(registry, "METHODS", registry.METHODS)

    @dataclasses.dataclass(frozen=True)
    class Mine(VeRA):
        name: ClassVar[str] = "mine"
        rank: int = 4

    registry.METHODS["mine"] = Mine
    yield Mine
    del registry.METHODS["mine"], register._BY_METHOD["mine"]


def test_a_method_from_outside(outside, tmp_path):
    config = sp.config_of("mine")
    assert config is sp.config_of(outside)
    assert config.__name__ == "MineConfig"
    model = trained(new(), config(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(new(), tmp_path)), logits(model))
    assert torch.equal(logits(spectune.attach(new(), spectune.Adapter.load(tmp_path))), logits(model))

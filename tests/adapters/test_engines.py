"""Which form of an adapter each program takes, and what none is given."""

import json

import pytest
import torch

import spectune
import tiny
from adapters.adapter_cases import small
from adapters.formats.test_gguf_lora import trained
from spectune import Adapter, SpectuneError
from spectune.adapters.engines import ENGINES


def test_an_export_names_the_program_or_the_format(tmp_path):
    own = spectune.extract(spectune.adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), "lora:rank=2"))
    own.export(tmp_path / "served", to="mlx")
    assert (tmp_path / "served" / "adapters.safetensors").is_file()
    with pytest.raises(SpectuneError, match="no program 'ollam' is known: one of vllm, sglang, "):
        own.export(tmp_path / "none", to="ollam")
    with pytest.raises(SpectuneError, match="to='mlx' says the format"):
        own.export(tmp_path / "none", "peft", to="mlx")


@pytest.mark.parametrize("engine", ["sglang", "tgi", "lorax"])
def test_programs_that_read_one_scale_are_given_one(tmp_path, engine):
    overrides = {"2": "lora:rank=4,alpha=2,rslora=true"}
    own = spectune.extract(spectune.adapt(small(), "lora:rank=2,alpha=6,rslora=true", overrides=overrides))
    for layer in own.layers.values():
        layer.terms[0].trained["B"].normal_()
    own.export(tmp_path / "served", to=engine)
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    served = Adapter.load(tmp_path / "served")
    for name in own.layers:
        torch.testing.assert_close(served.delta(name), own.delta(name))


@pytest.mark.parametrize("options", [{"modules_to_save": ["norm"]}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
@pytest.mark.parametrize("program", ["vllm", "sglang", "tgi", "lorax"])
def test_what_was_trained_beside_the_lora_goes_to_no_program_that_leaves_it_out(program, options, tmp_path):
    adapter = trained(tiny.gpt2() if "bias" in options else tiny.llama(), "lora:rank=2", **options)
    with pytest.raises(SpectuneError, match=f"was trained beside the LoRA, and {program} takes LoRA alone"):
        adapter.export(tmp_path / "a", to=program)
    assert not list(tmp_path.iterdir())


def test_the_rank_that_a_program_takes_is_that_of_the_fused_layer(monkeypatch, tmp_path):
    monkeypatch.setitem(ENGINES, "vllm", ENGINES["vllm"]._replace(most=6))
    adapter = trained(tiny.phi3(), "lora:rank=3", targets=["q_proj", "k_proj", "v_proj"], split="auto")
    with pytest.raises(SpectuneError, match="up to 6, and an exact LoRA of this adapter has 9"):
        adapter.export(tmp_path / "a", to="vllm")


@pytest.mark.parametrize("program", ["vllm", "sglang", "tgi", "lorax"])
def test_layers_that_a_program_would_not_read_are_told(program, tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6), torch.nn.Conv1d(4, 4, 1))
    rows = spectune.extract(spectune.adapt(model, "lora:rank=2", targets=["0", "1"]))
    if ENGINES[program].embeddings:
        rows.export(tmp_path / "a", to=program)
        assert (tmp_path / "a" / "adapter_config.json").is_file()
    else:
        with pytest.raises(SpectuneError, match=f"{program} takes no LoRA of embedding layers, as '0'"):
            rows.export(tmp_path / "a", to=program)
    spectune.detach(model)
    kernels = spectune.extract(spectune.adapt(model, "lora:rank=2", targets=["1", "2"]))
    with pytest.raises(SpectuneError, match=f"{program} takes no LoRA of conv layers, as '2'"):
        kernels.export(tmp_path / "b", to=program)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("program", ["sglang", "tgi", "lorax"])
def test_experts_go_to_no_program_that_reads_linear_layers_alone(program, tmp_path):
    adapter = trained(tiny.mixtral(), "lora:rank=2")
    with pytest.raises(SpectuneError, match=f"{program} takes no LoRA of experts, as 'model.layers.0.mlp.experts"):
        adapter.export(tmp_path / "a", to=program)

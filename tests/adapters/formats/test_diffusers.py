"""The file that diffusers' pipelines load: names, ranks and alphas in its metadata, and the scale in the factors."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import spectune
from spectune.cli import app

FILE = "pytorch_lora_weights.safetensors"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)}), nn.Conv1d(2, 2, 1))


def adapter(method, **more):
    adapted = spectune.adapt(model(), method, targets=["q", "k"], **more)
    for p in adapted.parameters():
        p.data += torch.randn_like(p) if p.requires_grad else 0.0
    return spectune.extract(adapted)


def read(folder):
    with safe_open(folder / FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["lora_adapter_metadata"])


@pytest.mark.parametrize("method", [spectune.LoRA(rank=2, alpha=7, rslora=True), spectune.PiSSA(rank=1, alpha=3)])
def test_the_update_needs_no_alpha(method, tmp_path):
    made = adapter(method, overrides={"k": spectune.LoRA(rank=3, alpha=1, rslora=method.name == "lora")})
    written = made.export(tmp_path, format="diffusers", component="unet")
    tensors, told = read(tmp_path)
    for name in ("q", "k"):
        A, B = (tensors[f"unet.0.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(B @ A, made.delta(f"0.{name}"), atol=1e-5)
        assert torch.allclose(B @ A, written.delta(f"0.{name}"), atol=1e-5)
    ranks = {"0.q": len(tensors["unet.0.q.lora_A.weight"]), "0.k": 3}
    patterns = told["unet.rank_pattern"]
    assert told["unet.alpha_pattern"] == patterns
    assert {patterns.get(f"^0\\.{n[-1]}", told["unet.r"]) for n in ranks} == set(ranks.values())
    assert told["unet.lora_alpha"] == told["unet.r"]
    assert not told["unet.use_rslora"]


def test_dora_says_so(tmp_path):
    adapter(spectune.DoRA(spectune.LoRA(rank=2))).export(tmp_path, format="diffusers", component="transformer")
    tensors, told = read(tmp_path)
    assert told["transformer.use_dora"] is True
    assert tensors["transformer.0.q.lora_magnitude_vector"].shape == (6,)


def test_what_the_file_cannot_hold_is_told(tmp_path):
    made = adapter(spectune.LoRA(rank=2))
    for more, said in (({}, "give component"), ({"component": "vae"}, "must be one of unet, transformer")):
        with pytest.raises(spectune.SpectuneError, match=said):
            made.export(tmp_path / "new", format="diffusers", **more)
    whole = adapter(spectune.LoRA(rank=2), modules_to_save=["1"])
    with pytest.raises(spectune.SpectuneError, match="'1' was trained whole"):
        whole.export(tmp_path / "new", format="diffusers", component="unet")
    assert not (tmp_path / "new").exists()
    with pytest.raises(spectune.SpectuneError, match="the relative error would be"):
        adapter(spectune.SVF()).export(tmp_path / "new", format="diffusers", component="unet", rank=1)


def test_on_the_command_line(tmp_path, capsys):
    from typer.testing import CliRunner

    adapter(spectune.LoRA(rank=2)).save(tmp_path / "adapter")
    run = CliRunner()
    told = run.invoke(app, ["export", f"{tmp_path}/adapter", f"{tmp_path}/out", "--component", "unet"])
    assert told.exit_code != 0
    arguments = ["export", f"{tmp_path}/adapter", f"{tmp_path}/out", "--format", "diffusers", "--component", "unet"]
    told = run.invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert len(read(tmp_path / "out")[0]) == 4

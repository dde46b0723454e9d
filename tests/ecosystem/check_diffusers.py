"""diffusers: an exported LoRA in a pipeline of a UNet and of a DiT; the methods on them in our folder and in PEFT."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models import SD3Transformer2DModel
from ecosystem_cases import moved
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

import spectune
import spectune.peft
from spectune.cli import app
from training.folder import make_tokenizer


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4,
    ).eval()  # fmt: skip


def dit():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    ).eval()  # fmt: skip


def of_unet(model):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16  # which pipelines fill prompts up to
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, model, DDIMScheduler(), None, None, requires_safety_checker=False
    )


def of_dit(model):
    nothing = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **nothing)


def answer(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    more = {"pooled_projections": text.mean(1)} if isinstance(inside, SD3Transformer2DModel) else {}
    with torch.no_grad():
        return model(x, timestep=torch.tensor([3, 7]), encoder_hidden_states=text, **more).sample


CASES = [pytest.param(unet, of_unet, "unet", id="unet"), pytest.param(dit, of_dit, "transformer", id="dit")]
TARGETS = ["to_q", "to_k", "to_v"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(("new", "pipeline", "component"), CASES)
@pytest.mark.parametrize(
    "method",
    [spectune.LoRA(rank=4, alpha=6), spectune.PiSSA(rank=2), spectune.DoRA(spectune.LoRA(rank=2, alpha=5))],
    ids=["lora", "pissa", "dora"],
)
def test_a_pipeline_answers_as_the_adapted_model(new, pipeline, component, method, tmp_path):
    model = moved(
        spectune.adapt(
            new(),
            method,
            targets=TARGETS,
            overrides={"to_k": spectune.LoRA(rank=3, alpha=1)} if method.name == "lora" else None,
        )
    ).eval()
    y = answer(model)
    assert (y - answer(new())).abs().max() > 1e-3
    adapter = spectune.extract(model)
    adapter.export(tmp_path / "lora", format="diffusers")
    with safe_open(tmp_path / "lora" / FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(key.startswith(f"{component}.") for key in [*file.keys(), *told])
    assert told[f"{component}.lora_alpha"] == told[f"{component}.r"]
    pipe = pipeline(new())
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert torch.allclose(answer(getattr(pipe, component)), y, atol=1e-5)
    if method.name != "dora":  # whose direction nothing but the metadata tells of
        bare = pipeline(new())
        bare.load_lora_weights(load_file(tmp_path / "lora" / FILE))  # without the metadata
        assert torch.allclose(answer(getattr(bare, component)), y, atol=1e-5)


def test_a_pipeline_draws_what_the_adapted_one_draws(tmp_path):
    def drawn(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        return torch.tensor(pipe("say ahoy", num_inference_steps=2, generator=generator, output_type="np").images)

    pipe = of_unet(unet())
    base = drawn(pipe)
    moved(spectune.adapt(pipe.unet, spectune.LoRA(rank=4), targets=TARGETS)).eval()
    expected = drawn(pipe)
    assert (expected - base).abs().max() > 1e-4
    spectune.extract(pipe.unet).export(tmp_path, format="diffusers")
    other = of_unet(unet())
    other.load_lora_weights(str(tmp_path))
    assert torch.allclose(drawn(other), expected, atol=1e-4)


@pytest.mark.parametrize(("new", "pipeline", "component"), CASES)
def test_svf_is_kept_in_our_folder_and_in_pefts(new, pipeline, component, tmp_path):
    model = moved(spectune.adapt(new(), spectune.SVF())).eval()
    y = answer(model)
    spectune.extract(model).save(tmp_path / "ours")
    assert torch.allclose(answer(spectune.attach(new(), spectune.Adapter.load(tmp_path / "ours"))), y, atol=1e-6)
    assert torch.allclose(answer(PeftModel.from_pretrained(new(), tmp_path / "ours")), y, atol=1e-6)
    config = spectune.peft.SVFConfig(target_modules=TARGETS)
    inside = new()
    inside.add_adapter(config, "one")  # diffusers' own call
    assert torch.equal(answer(inside), answer(new()))
    theirs = moved(get_peft_model(new(), config)).eval()
    theirs.save_pretrained(tmp_path / "peft")
    again = spectune.attach(new(), spectune.Adapter.load(tmp_path / "peft"))
    assert torch.allclose(answer(again), answer(theirs.base_model.model), atol=1e-6)
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(answer(type(new()).from_pretrained(tmp_path / "merged").eval()), y, atol=1e-4)


def test_from_the_command_line(tmp_path):
    unet().save_pretrained(tmp_path / "base")
    model = moved(
        spectune.adapt(
            UNet2DConditionModel.from_pretrained(tmp_path / "base"), spectune.LoRAXS(rank=3), targets=TARGETS
        )
    )
    y = answer(model.eval())
    spectune.extract(model).save(tmp_path / "adapter")
    run = CliRunner().invoke
    told = run(
        app,
        ["export", f"{tmp_path}/adapter", f"{tmp_path}/lora", "--format", "diffusers", "--base", f"{tmp_path}/base"],
    )
    assert told.exit_code == 0, told.output
    pipe = of_unet(unet())
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert torch.allclose(answer(pipe.unet), y, atol=1e-4)
    told = run(
        app,
        [
            "export",
            f"{tmp_path}/adapter",
            f"{tmp_path}/other",
            "--format",
            "diffusers",
            "--component",
            "x",
            "--base",
            f"{tmp_path}/base",
        ],
    )
    assert told.exit_code != 0


def test_what_the_file_cannot_hold_is_told(tmp_path):
    model = spectune.adapt(unet(), spectune.LoRA(rank=2), targets=TARGETS, modules_to_save=["conv_out"])
    with pytest.raises(spectune.SpectuneError, match="'conv_out' was trained whole"):
        spectune.extract(model).export(tmp_path, format="diffusers")
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapter = spectune.extract(spectune.adapt(plain, spectune.LoRA(rank=2)))
    with pytest.raises(spectune.SpectuneError, match="give component"):
        adapter.export(tmp_path, format="diffusers")
    with pytest.raises(spectune.SpectuneError, match="component must be one of unet"):
        adapter.export(tmp_path, format="diffusers", component="vae")

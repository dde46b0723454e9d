"""Adapters in the words of mlx_lm: the file, read by itself, gives the base's W' back."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from adapters.formats.test_gguf_lora import trained
from spectune import SpectuneError
from spectune.layers.modules import effective_weight, find_linear


@pytest.mark.parametrize("method", ["lora:rank=2,alpha=3", "pissa:rank=2", "dora:inner=lora,rank=2"])
def test_what_mlx_reads_is_the_update(method, tmp_path):
    base = tiny.llama()
    adapter = trained(base, method, rank_pattern={"q_proj": 1}).bind(base)
    adapter.export(tmp_path / "mlx", "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    given = config["lora_parameters"]
    assert config["fine_tune_type"] == method.partition(":")[0].replace("pissa", "lora")
    assert given["keys"] == sorted(
        [*(f"mlp.{n}_proj" for n in ("gate", "up", "down")), *(f"self_attn.{n}_proj" for n in "qkvo")]
    )
    for name in adapter.layers:
        W = effective_weight(find_linear(base, name)).detach()
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert (a.shape[1], b.shape[0]) == (given["rank"], given["rank"])
        merged = W + given["scale"] * (a @ b).T
        if f"{name}.m" in tensors:
            merged *= (tensors[f"{name}.m"] / merged.norm(dim=1))[:, None]
        torch.testing.assert_close(merged, W + adapter.delta(name), atol=1e-5, rtol=1e-4)


def test_gpt2_has_the_names_that_mlx_gives_it(tmp_path):
    base = tiny.gpt2()
    adapter = trained(base, "lora:rank=2,alpha=3").bind(base)
    with pytest.raises(
        SpectuneError, match=r"'transformer\.h\.0\.attn\.c_attn' goes by the model's type: give config="
    ):
        adapter.export(tmp_path / "mlx", "mlx")
    adapter.export(tmp_path / "mlx", "mlx", config=base.config)
    given = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert given["keys"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert {key.rpartition(".")[0] for key in tensors} == {
        f"model.h.{i}.{key}" for i in (0, 1) for key in given["keys"]
    }
    made = (tensors["model.h.1.attn.c_attn.lora_a"] @ tensors["model.h.1.attn.c_attn.lora_b"]).T
    torch.testing.assert_close(made, adapter.delta("transformer.h.1.attn.c_attn"))

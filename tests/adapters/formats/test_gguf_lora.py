"""Adapters in the words of llama.cpp and mlx_lm: the file, read by itself, gives the base's W' back."""

import copy
from typing import Any

import pytest
import torch

import spectune
import tiny
from spectune import SpectuneError

IDS = torch.arange(1, 15).reshape(2, 7)


def trained(base, method, **options):
    model = spectune.adapt(copy.deepcopy(base), method, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return spectune.extract(model)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_what_llama_cpp_reads_is_the_update(kind, tmp_path):
    import gguf

    base = getattr(tiny, kind)()
    adapter = trained(base, "lora:rank=2,alpha=3", rank_pattern={"down_proj": 3})
    adapter.export(tmp_path / "out", "gguf", config=base.config)
    reader: Any = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == kind
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(tensors) == 2 * len(adapter.layers)

    def delta(key):
        A, B = tensors[f"{key}.weight.lora_a"], tensors[f"{key}.weight.lora_b"]
        return alpha / len(A) * (B @ A)

    torch.testing.assert_close(delta("blk.1.ffn_down"), adapter.delta("model.layers.1.mlp.down_proj"))
    if kind == "llama":  # row 2i + j of a head is what was row j * size / 2 + i
        for name, heads in (("q", 4), ("k", 2)):
            own = adapter.delta(f"model.layers.0.self_attn.{name}_proj")
            turned = torch.stack(
                [row for head in own.chunk(heads) for row in head.view(2, 4, 32).mT.mT.transpose(0, 1).flatten(0, 1)]
            )
            torch.testing.assert_close(delta(f"blk.0.attn_{name}"), turned)
        torch.testing.assert_close(delta("blk.0.attn_v"), adapter.delta("model.layers.0.self_attn.v_proj"))


def test_what_a_program_does_not_take_is_refused_with_what_to_do(tmp_path):
    base = tiny.llama()
    with pytest.raises(SpectuneError, match=r"llama\.cpp takes LoRA alone: merge it"):
        trained(base, "dora:inner=lora,rank=2").export(tmp_path / "a", "gguf", config=base.config)
    with pytest.raises(SpectuneError, match="gguf needs the configuration"):
        trained(base, "lora:rank=2").export(tmp_path / "a", "gguf")
    with pytest.raises(SpectuneError, match="trained beside the LoRA, and mlx_lm takes LoRA alone"):
        trained(base, "lora:rank=2", modules_to_save=["norm"]).export(tmp_path / "a", "mlx")
    bert = tiny.bert()
    with pytest.raises(SpectuneError, match="and not for 'bert'"):
        trained(bert, "lora:rank=2").export(tmp_path / "a", "gguf", config=bert.config)
    assert not list(tmp_path.iterdir())


def test_the_command_line_chooses_by_the_program(tmp_path):
    from typer.testing import CliRunner

    from spectune.cli import app

    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    for name, method in (("lora", "lora:rank=2"), ("dora", "dora:inner=lora,rank=2")):
        adapter = trained(base, method)
        adapter.base_model = str(tmp_path / "base")
        adapter.save(tmp_path / name)

    def run(*arguments):
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    assert run(tmp_path / "lora", tmp_path / "o", "--to", "ollama").exit_code == 0
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"adapter.gguf", "Modelfile"}
    assert run(tmp_path / "lora", tmp_path / "v", "--to", "vllm").exit_code == 0
    assert (tmp_path / "v" / "adapter_config.json").exists()
    for program in ("sglang", "tgi", "lorax", "llama.cpp", "mlx"):
        result = run(tmp_path / "lora", tmp_path / program, "--to", program)
        assert result.exit_code == 0, result.exception
        assert "next: " in result.output
    for arguments, said in (
        (("dora", "--to", "vllm"), "vllm takes no DoRA"),
        (("lora", "--to", "vllm", "--rank", "600"), "ranks of up to 512"),
        (("lora", "--to", "vllm", "--format", "peft"), "--to vllm says the format"),
    ):
        result = run(tmp_path / arguments[0], tmp_path / "x", *arguments[1:])
        assert isinstance(result.exception, SpectuneError)
        assert said in str(result.exception)
    assert not (tmp_path / "x").exists()

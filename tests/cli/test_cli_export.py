"""spectune export and import."""

import json

import torch

import spectune
from cli.typed import fails, run
from spectune.adapters.engines import ENGINES


def test_export_to_peft_and_import_again(model, adapters, tmp_path):
    result = json.loads(
        run("export", adapters["pirate"], str(tmp_path / "peft"), "--rank", "4", "--allow-loss", "--json").stdout
    )
    assert 0 < result["error"] < 1
    run("import", str(tmp_path / "peft"), str(tmp_path / "back"))
    ours = spectune.Adapter.load(tmp_path / "back")
    assert ours.layers["model.layers.0.mlp.up_proj"].terms[0].method == spectune.LoRA(rank=4, alpha=4)


def test_one_rank_for_programs_that_read_no_patterns(model, tmp_path):
    torch.manual_seed(0)
    mixed, _ = spectune.load_base(model, "fp32")
    spectune.adapt(mixed, "lora:rank=2", ["q_proj", "v_proj"], overrides={"v_proj": "lora:rank=3"})
    with torch.no_grad():
        for parameter in mixed.parameters():
            parameter.add_(0.1) if parameter.requires_grad else None
    mixed = spectune.extract(mixed)
    mixed.save(tmp_path / "mixed")
    run("export", str(tmp_path / "mixed"), str(tmp_path / "peft"), "--one-rank")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})
    padded = spectune.Adapter.load(tmp_path / "peft")
    for name in mixed.layers:
        torch.testing.assert_close(padded.delta(name), mixed.delta(name))


def test_export_merged_is_a_plain_model_with_the_same_tokens(model, adapters, tmp_path):
    run("export", adapters["pirate"], str(tmp_path / "merged"), "--format", "merged")
    arguments = ["say one", "--json", "--dtype", "fp32", "--max-new-tokens", "6"]
    merged = json.loads(run("generate", str(tmp_path / "merged"), *arguments).stdout)
    adapted = json.loads(run("generate", model, "-a", adapters["pirate"], *arguments).stdout)
    assert merged[0]["tokens"] == adapted[0]["tokens"]


def test_options_of_another_format_are_refused(adapters, tmp_path, monkeypatch, capsys):
    export = ("export", adapters["pirate"], str(tmp_path / "out"))
    for option in (("--rank", "2"), ("--one-rank",)):
        told = fails(monkeypatch, capsys, *export, "--format", "merged", *option)
        assert f"{option[0]} is for a LoRA, and --format merged" in told
    assert "--dtype is for --format merged, and not for peft" in fails(monkeypatch, capsys, *export, "--dtype", "bf16")
    assert not (tmp_path / "out").exists()


def test_without_a_folder_it_goes_beside_the_adapter(tmp_path, monkeypatch, capsys):
    made = spectune.adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), "lora:rank=2")
    spectune.extract(made).save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    result = json.loads(run("export", ".", "--to", "vllm", "--json").stdout)
    assert result["output"] == str(tmp_path / "mine-vllm")
    run("export", "../mine")
    assert spectune.Adapter.load(tmp_path / "mine-peft").layers.keys() == {"0"}
    assert "mine-vllm exists" in fails(monkeypatch, capsys, "export", ".", "--to", "vllm")


def test_an_exact_lora_is_made_once(adapters, tmp_path, monkeypatch):
    made = []
    to_lora = spectune.Adapter.to_lora
    monkeypatch.setattr(spectune.Adapter, "to_lora", lambda *given: (made.append(given), to_lora(*given))[1])
    run("export", adapters["pirate"], str(tmp_path / "served"), "--to", "vllm")
    assert len(made) == 1
    assert spectune.Adapter.load(tmp_path / "served").layers


def test_nothing_is_written_where_a_program_takes_no_such_rank(adapters, tmp_path, monkeypatch, capsys):
    known = {**ENGINES, "vllm": ENGINES["vllm"]._replace(most=2)}
    monkeypatch.setattr("spectune.adapters.engines.ENGINES", known)
    said = fails(monkeypatch, capsys, "export", adapters["pirate"], str(tmp_path / "served"), "--to", "vllm")
    assert "vllm takes ranks of up to 2, and an exact LoRA of this adapter has" in said
    assert not (tmp_path / "served").exists()

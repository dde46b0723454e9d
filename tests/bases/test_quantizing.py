"""Bases that are loaded in 4 or 8 bits: what loads them, trains over them and answers from them."""

import json
import sys

import pytest
import torch
import transformers
from typer.testing import CliRunner

import spectune
from spectune import SpectuneError
from spectune.cli import app
from spectune.layers.modules import effective_weight, linear_layers
from spectune.layers.packed import is_packed
from spectune.training.config import load_config
from spectune.training.run import train
from training.folder import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    records = [{"prompt": f"say {n}", "completion": f"ahoy {n}"} for n in ("one", "two", "three", "four")]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def packed_layers(model):
    return {name for name, layer in linear_layers(model).items() if is_packed(layer)}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_over_a_packed_base(folder, data, tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    settings = [
        f"model={folder}",
        f"data={data}",
        "held_out=0.25",
        "dtype=fp32",
        "device=cpu",
        "max_steps=6",
        "lr=5e-2",
    ]
    settings += [f"output={out}", "method=svf", "save_steps=3", f"quantize={quantize}", "targets=[q_proj, up_proj]"]
    result = train(load_config(None, settings))
    assert result.loss_after != result.loss_before  # six steps on four records may go either way
    again = train(load_config(None, [*settings, "max_steps=6", "resume=true"]))
    assert again.loss_after == pytest.approx(result.loss_after, rel=1e-5)
    assert f"--quantize {quantize}" in (out / "README.md").read_text()

    model, _ = spectune.load_base(folder, "fp32", quantize=quantize)
    assert len(packed_layers(model)) == 14
    assert "lm_head" not in packed_layers(model)
    spectune.attach(model, spectune.Adapter.load(out))
    with pytest.raises(SpectuneError, match=r"is packed .* keep the adapter"):
        model.save_pretrained(tmp_path / "merged")
    whole, _ = spectune.load_base(folder, "fp32")
    with pytest.raises(SpectuneError, match=f"quantize={quantize}, and is the same only if it is loaded with the same"):
        spectune.attach(whole, spectune.Adapter.load(out))

    asked = ["generate", str(folder), "say one", "-a", str(out), "--dtype", "fp32", "--device", "cpu", "--json"]
    for given in (["--quantize", quantize], []):  # the adapter says how its base was packed
        answered = CliRunner().invoke(app, [*asked, "--max-new-tokens", "3", *given])
        assert answered.exit_code == 0, answered.output
    answered = CliRunner().invoke(app, [*asked, "--quantize", "int8" if quantize == "nf4" else "nf4"])
    assert isinstance(answered.exception, SpectuneError)


def test_transformers_trainer_takes_it(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, _ = spectune.load_base(folder, "fp32", quantize="nf4")
    spectune.adapt(model, spectune.LoRA(rank=2))
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": torch.arange(4, 10), "labels": torch.arange(4, 10)} for _ in range(4)]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())
    assert spectune.detach(model).is_quantized


def test_what_cannot_be_is_one_sentence(folder, tmp_path, monkeypatch):
    with pytest.raises(SpectuneError, match="quantize must be one of nf4, int8, not 'nf5'; did you mean 'nf4'"):
        spectune.load_base(folder, quantize="nf5")
    for text in ("nf4:16", "nf4:rank=x", "nf4:rank=2,rank=3", "nf4:bits=3"):
        with pytest.raises(
            SpectuneError, match=f"quantize '{text}' is not understood at .*: write nf4:rank=16,refine=5"
        ):
            spectune.load_base(folder, quantize=text)
    for text in ("int8:rank=4", "nf4:refine=2", "nf4:rank=0"):
        with pytest.raises(SpectuneError, match="a rank beside what is packed, and refine with it, are for nf4"):
            spectune.load_base(folder, quantize=text)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SpectuneError, match=r"quantize=nf4 needs bitsandbytes: pip install spectune\[quantized\]"):
        spectune.load_base(folder, quantize="nf4")
    with pytest.raises(SpectuneError, match=r"pip install spectune\[quantized\]"):
        train(load_config(None, [f"model={folder}", f"data={tmp_path}", f"output={tmp_path}/out", "quantize=int8"]))


def test_a_base_that_is_quantized_already(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = spectune.load_base(folder, "fp32", quantize="int8")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SpectuneError, match=r"is quantized already \(bitsandbytes\): leave quantize out"):
        spectune.load_base(tmp_path, quantize="nf4")
    assert packed_layers(spectune.load_base(tmp_path, "fp32")[0])


def lost(folder, whole, quantize):
    """Return ||W - W~|| over the linear layers of a base."""
    model, _ = spectune.load_base(folder, "fp32", quantize=quantize)
    weights = {n: effective_weight(layer) for n, layer in linear_layers(whole).items()}
    packed = {n: effective_weight(layer) for n, layer in linear_layers(model).items() if is_packed(layer)}
    assert len(packed) == 14
    return sum(float((weights[n].detach() - W).square().sum()) for n, W in packed.items()) ** 0.5


def test_a_part_of_each_weight_beside_what_is_packed_brings_it_nearer(folder):
    pytest.importorskip("bitsandbytes")
    whole, _ = spectune.load_base(folder, "fp32")
    alone = lost(folder, whole, "nf4")
    by_rank = [lost(folder, whole, f"nf4:rank={rank}") for rank in (2, 8, 32)]
    assert sorted([alone, *by_rank], reverse=True) == [alone, *by_rank]
    assert by_rank[-1] < alone / 2
    once = [lost(folder, whole, f"nf4:rank=8,refine={refine}") for refine in (0, 1, 4)]
    assert sorted(once, reverse=True) == once
    assert lost(folder, whole, "nf4:rank=9999") < alone / 20  # the whole weight, and what 4 bits add to it


def test_an_adapter_over_such_a_base_is_that_bases(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    text = "nf4:rank=4,refine=1"
    model, _ = spectune.load_base(folder, "fp32", quantize=text)
    spectune.adapt(model, spectune.SVF(), targets=["q_proj"])
    spectune.extract(model).save(tmp_path)
    loaded = spectune.Adapter.load(tmp_path)
    assert [a.quantize for a in (loaded, 2 * loaded, spectune.extract(model).to_lora())] == [text] * 3
    for other in (None, "nf4", "nf4:rank=4,refine=0"):
        base, _ = spectune.load_base(folder, "fp32", quantize=other)
        with pytest.raises(SpectuneError, match="loaded with the same quantize"):
            spectune.attach(base, spectune.Adapter.load(tmp_path))
    ids = torch.arange(4, 10)[None]
    again, _ = spectune.load_base(folder, "fp32", quantize=text)
    attached = spectune.attach(again, spectune.Adapter.load(tmp_path))
    torch.testing.assert_close(attached(ids).logits, model(ids).logits)

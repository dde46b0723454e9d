"""Predicted files are the files that are written, byte for byte."""

import pytest
import torch

import spectune
import spectune.methods
import tiny
from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.model.targets import resolve
from spectune.model.wanted import fresh_heads
from spectune.planning.plan import default_methods
from spectune.planning.sizes import adapter_sizes, bases_bytes

SMALL = {"pissa": "pissa:rank=4", "milora": "milora:rank=4", "lora_xs": "lora_xs:rank=4", "vera": "vera:rank=8"}
SMALL |= {"dora": "dora:rank=4", "dora:inner=pissa": "dora:inner=pissa,rank=4"}
METHODS = [SMALL.get(m, m) for m in default_methods() if m != "full"]
METHODS += ["lora:rank=3,rslora=true", "svft:pattern=banded,width=2,gate=true", "svf:parametrization=sigmoid"]


def on_meta(architecture):
    return tiny.ARCHITECTURES[architecture]().to("meta")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "deberta"])
@pytest.mark.parametrize("method", METHODS)
def test_files_have_the_predicted_sizes(architecture, method, tmp_path):
    model = tiny.ARCHITECTURES[architecture]()
    exclude = ["classifier"] if architecture == "deberta" else ()  # of three rows
    spectune.adapt(model, method, exclude=exclude)
    spectune.extract(model).save(tmp_path)
    meta = on_meta(architecture)
    chosen = resolve(meta, spectune.methods.parse(method), exclude=exclude, heads=fresh_heads(meta))
    expected = tuple((tmp_path / name).stat().st_size for name in (WEIGHTS, CONFIG))
    assert adapter_sizes(meta, chosen) == expected


def test_methods_may_differ_by_layer(tmp_path):
    model, meta, overrides = tiny.llama(), on_meta("llama"), {"q_proj": "lora:rank=2", "o_proj": None}
    spectune.adapt(model, "svf", overrides=overrides)
    spectune.extract(model).save(tmp_path)
    chosen = resolve(meta, spectune.SVF(), overrides=overrides)
    assert adapter_sizes(meta, chosen) == tuple((tmp_path / n).stat().st_size for n in (WEIGHTS, CONFIG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_bases_have_the_predicted_sizes(method, dtype):
    model = tiny.llama().to(dtype)
    spectune.adapt(model, method)
    tensors = {b.data_ptr(): b for n, b in model.named_buffers() if ".bases." in n}
    expected = sum(b.numel() * b.element_size() for b in tensors.values())
    meta = on_meta("llama")
    assert bases_bytes(meta, resolve(meta, spectune.methods.parse(method)), dtype) == expected

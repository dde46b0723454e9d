"""PEFT reads what we write and we read what PEFT writes: the same keys, the same config, the same logits."""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import spectune
import tiny
from adapters.adapter_cases import assert_same_update, deltas, made
from spectune import Adapter, SpectuneError

IDS = torch.arange(5, 15).repeat(2, 1)
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}
IGNORED = {"peft_version", "target_modules", "base_model_name_or_path", "auto_mapping"}  # say who saved what, where


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS)[0]


@contextmanager
def pefts_own_warnings() -> Iterator[None]:
    """Silence what PEFT says of Conv1D, of its PiSSA, of rank 0, and what transformers says of PEFT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape", category=UserWarning)
        yield


def in_peft(model: Any, folder: Any) -> Any:
    with pefts_own_warnings():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_model(model: Any, config: Any, **options: Any) -> Any:
    with pefts_own_warnings():
        return peft.get_peft_model(model, config, **options)


def assert_peft_answers_like(folder: Any, build: Any, adapter: Adapter) -> Any:
    ours = spectune.attach(build(), adapter)
    theirs = in_peft(build(), folder)
    assert not torch.allclose(logits(ours), logits(build()), atol=1e-3)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    return theirs


# -- ours in PEFT


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", ["lora:rank=4", "lora:rank=4,rslora=true,alpha=6,dropout=0.1", "dora:rank=4"])
def test_our_folder_is_pefts_own(tmp_path, architecture, method):
    build = MODELS[architecture]
    adapter = made(method, build())
    adapter.save(tmp_path / "ours")
    theirs = assert_peft_answers_like(tmp_path / "ours", build, adapter)

    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in again.items()}
    assert all(torch.equal(value, again[key]) for key, value in ours.items())
    read, written = (peft.LoraConfig.from_pretrained(tmp_path / f) for f in ("ours", "theirs"))
    read, written = ({k: v for k, v in vars(c).items() if k not in IGNORED} for c in (read, written))
    assert read == written
    documents = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")]
    assert documents[0].keys() <= documents[1].keys()
    assert_same_update(Adapter.load(tmp_path / "theirs").bind(build()), adapter.bind(build()))


def test_the_folder_that_peft_makes_from_the_start_has_the_same_keys(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_dora=True)
    peft_model(tiny.llama(), config).save_pretrained(tmp_path / "theirs")
    made("dora:rank=4", tiny.llama()).save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert any(key.endswith(".lora_magnitude_vector") for key in ours)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    "method", ["pissa:rank=4", "milora:rank=4,alpha=6", "lora_xs:rank=4", "adalora:rank=4", "vera:rank=5"]
)
def test_exports_are_exact(tmp_path, architecture, method):
    build = MODELS[architecture]
    adapter = made(method, build())
    exported = adapter.export(tmp_path)
    assert exported.error == 0.0
    assert_peft_answers_like(tmp_path, build, adapter)
    wide = {"pissa": 8, "milora": 8, "lora_xs": 4, "adalora": 6, "vera": 5}[method.partition(":")[0]]
    assert {layer.terms[0].method.rank for layer in exported.layers.values()} == {wide}
    assert_same_update(Adapter.from_peft(tmp_path), adapter)


def test_sums_and_mixtures_are_exported_exactly(tmp_path):
    build = tiny.llama
    parts = [made(m, build(), seed=i) for i, m in enumerate(["pissa:rank=2", "milora:rank=2", "lora_xs:rank=3"])]
    total = 0.7 * parts[0] + 0.3 * parts[1] - 0.5 * parts[2] + 0.2 * made("adalora:rank=2", build(), seed=9)
    total.export(tmp_path / "sum")
    assert_peft_answers_like(tmp_path / "sum", build, total)
    expected = sum(w * deltas(p)["model.layers.0.mlp.up_proj"] for w, p in zip((0.7, 0.3, -0.5), parts, strict=True))
    got = deltas(0.7 * parts[0] + 0.3 * parts[1] - 0.5 * parts[2])["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    loras = 0.5 * made("lora:rank=2", build(), seed=3) - made("lora:rank=4,rslora=true", build(), seed=4)
    loras.save(tmp_path / "loras")  # already PEFT's format
    assert_peft_answers_like(tmp_path / "loras", build, loras)
    half = 0.5 * made("lora:rank=2", build(), seed=3)
    half.save(tmp_path / "half")
    assert json.loads((tmp_path / "half/adapter_config.json").read_text())["lora_alpha"] == 8
    assert_peft_answers_like(tmp_path / "half", build, half)


@pytest.mark.parametrize("rslora", ["true", "false"])
@pytest.mark.parametrize("around", ["lora:", "dora:inner=lora,"])
def test_ranks_and_alphas_that_differ_by_layer(tmp_path, rslora, around):
    overrides = {
        "k_proj": f"{around}rank=2,alpha=3,rslora={rslora}",
        "layers.1.mlp.up_proj": f"{around}rank=5,rslora={rslora}",
        "down_proj": None,
    }
    adapter = made(f"{around}rank=4,alpha=9,rslora={rslora}", tiny.llama(), overrides=overrides)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["rank_pattern"])) == (4, 9, 3)
    assert_peft_answers_like(tmp_path, tiny.llama, adapter)
    loaded = Adapter.load(tmp_path)
    assert {n: layer.terms[0].method for n, layer in loaded.layers.items()} == {
        n: layer.terms[0].method for n, layer in adapter.layers.items()
    }


def test_lora_that_pefts_config_cannot_say_is_kept_by_us_and_exported_plainly(tmp_path):
    for overrides in ({"k_proj": "lora:rank=2,rslora=true"}, {"k_proj": "dora:rank=2"}, {"k_proj": "lora:dropout=.5"}):
        adapter = made("lora:rank=4", tiny.llama(), overrides=overrides)
        adapter.save(tmp_path / "kept")
        assert json.loads((tmp_path / "kept/adapter_config.json").read_text())["library_name"] == "spectune"
        assert_same_update(Adapter.load(tmp_path / "kept").bind(tiny.llama()), adapter)
        assert adapter.export(tmp_path / "exported").error == 0.0
        assert_peft_answers_like(tmp_path / "exported", tiny.llama, adapter)


class Odd(nn.Module):
    """Modules whose names are special in a regex, and ends of one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleDict({"q+(x)": nn.Linear(6, 6), "q*": nn.Linear(6, 6), "[a-z]|": nn.Linear(6, 6)})
        self.q = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())])
        self.top = nn.Linear(6, 6)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        x = torch.nn.functional.one_hot(input_ids % 6, 6).float()
        for layer in (*self.blocks.values(), *self.q, self.top):
            x = layer(x)
        return (x,)


@pytest.mark.parametrize("targets", ["all-linear", ["q+(x)", "0"], ["top", "q.0"]])
def test_names_that_are_special_in_a_regex(tmp_path, targets):
    overrides = {"q.0": "lora:rank=2,alpha=1"} | ({"blocks.q*": "lora:rank=1"} if targets == "all-linear" else {})
    adapter = made("lora:rank=3", Odd(), targets=targets, overrides=overrides)
    adapter.save(tmp_path)
    theirs = assert_peft_answers_like(tmp_path, Odd, adapter)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == adapter.layers.keys()
    theirs.save_pretrained(tmp_path / "again")
    assert_same_update(Adapter.from_peft(tmp_path / "again"), adapter)


def test_a_layer_at_the_top_of_a_model_is_not_taken_for_the_end_of_other_names(tmp_path):
    def build() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 6))

    adapter = made("lora:rank=2", build(), targets=["2", "1.1"], overrides={"2": "lora:rank=3"})
    adapter.save(tmp_path)
    theirs = in_peft(build(), tmp_path)
    ours = spectune.attach(build(), adapter)
    torch.testing.assert_close(theirs.base_model(IDS), ours(IDS), rtol=1e-5, atol=1e-5)


def test_more_layers_than_peft_lists_as_they_are(tmp_path):
    def build() -> Any:
        return tiny.llama(num_hidden_layers=5)

    adapter = made("lora:rank=2", build(), targets=["q_proj", "v_proj", "up_proj", "down_proj", "o_proj"])
    assert len(adapter.layers) == 25  # PEFT shortens lists of 20 and more
    adapter.save(tmp_path / "ours")
    assert_peft_answers_like(tmp_path / "ours", build, adapter).save_pretrained(tmp_path / "theirs")
    assert_same_update(Adapter.load(tmp_path / "theirs"), adapter)


@pytest.mark.parametrize(
    "method",
    ["svf", "svft:pattern=banded,width=2", "dora:inner=svf", "dora:inner=pissa,rank=2", "dora:rank=2", "pissa:rank=4"],
)
def test_best_lora_of_a_rank(tmp_path, method):
    adapter = made(method, tiny.llama(), targets=["q_proj", "up_proj"])
    exported = adapter.export(tmp_path / "r", rank=3, allow_loss=True)
    lost = total = 0.0
    for name, delta in deltas(adapter).items():
        S = torch.linalg.svdvals(delta)
        left = (exported.delta(name).double() - delta).square().sum()
        assert math.isclose(left, S[3:].square().sum(), rel_tol=1e-4)
        assert torch.linalg.matrix_rank(exported.delta(name)) == 3
        lost, total = lost + S[3:].square().sum(), total + S.square().sum()
    assert math.isclose(exported.error, math.sqrt(lost / total), rel_tol=1e-4)
    assert_peft_answers_like(tmp_path / "r", tiny.llama, exported)


@pytest.mark.parametrize("method", ["svf", "svft", "dora:inner=svf", "dora:inner=lora_xs,rank=4"])
def test_full_rank_updates_are_exported_or_merged_exactly(tmp_path, method):
    adapter = made(method, tiny.llama(), scale=0.1)
    assert adapter.export(tmp_path).error == 0.0
    theirs = in_peft(tiny.llama(), tmp_path)
    ours = spectune.attach(tiny.llama(), adapter)
    expected = logits(ours)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    merged = spectune.merge(ours)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=3e-5)


def test_export_refuses_an_unknown_format(tmp_path):
    with pytest.raises(SpectuneError, match="format must be 'peft', 'diffusers', 'gguf' or 'mlx', not 'ggml'"):
        made("lora:rank=2").export(tmp_path, "ggml")  # type: ignore[arg-type]


# -- PEFT's in ours

"""Folders in PEFT's words: every name there and back, what no config of PEFT can say, and what PEFT saves beside."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
from adapters.adapter_cases import made, moved, small
from spectune import SpectuneError
from spectune.adapters.formats.bilingual import VERSION, in_peft_words, own_names, peft_type
from spectune.adapters.formats.dialect import PREFIX
from spectune.adapters.formats.peft_reading import TOKENS
from spectune.adapters.formats.spectune import contents
from spectune.adapters.schema import AdapterConfig

WHERE = Path("adapter_config.json")
TYPES = {
    "svf": "SVF", "pissa:rank=2": "PISSA", "milora:rank=2": "MILORA", "lora_xs:rank=2": "LORAXS",
    "svft:pattern=banded,width=1": "SVFT", "adalora:rank=2": "SPECTUNEADALORA", "vera:rank=2": "SPECTUNEVERA",
    "dora:inner=svf": "SVF",
}  # fmt: skip


def typed(config: dict[str, Any]) -> AdapterConfig:
    return AdapterConfig(**{key: config[key] for key in AdapterConfig.model_fields if key in config})


def back(config, tensors):
    return own_names(tensors, config, typed(config), WHERE)


@pytest.mark.parametrize("method", TYPES)
def test_names_there_and_back(method):
    adapter = made(method)
    config, tensors, _ = contents(adapter)
    kind = config["peft_type"]
    assert (kind, config["format_version"], peft_type(adapter)) == (TYPES[method], VERSION, kind)
    assert set(config["target_modules"].split("|")) == set(adapter.layers)
    assert config["use_dora"] == method.startswith("dora")
    for name, layer in adapter.layers.items():
        for key, tensor in layer.terms[0].trained.items():
            assert tensors[f"{PREFIX}{name}.{kind.lower()}_{key}"] is tensor
    own, modules = back(config, tensors)
    assert modules == {}
    assert {key for key in own if key.startswith("0.") and "sketch" not in key and "base" not in key} == {
        f"0.0.{key}" for key in adapter.layers["0"].terms[0].trained
    }
    for name, layer in adapter.layers.items():
        for key, tensor in layer.terms[0].trained.items():
            assert torch.equal(own[f"{name}.0.{key}"], tensor)
        if f"{name}.base" in own:
            assert torch.equal(own[f"{name}.base"], adapter.base_sketch(name))


def test_bases_that_are_stored_have_names_of_their_own():
    adapter = made("pissa:rank=2")
    config, tensors, _ = contents(adapter, embed=True)
    own, _ = back(config, tensors)
    for name, layer in adapter.layers.items():
        for key, tensor in layer.terms[0].basis.items():
            assert tensors[f"{PREFIX}{name}.pissa_basis_{key}"] is tensor
            assert torch.equal(own[f"{name}.0.basis.{key}"], tensor.float())


def test_a_head_is_a_module_that_is_saved_in_the_layout_of_the_layer():
    model = moved(spectune.adapt(small(), "svf", ["0"], modules_to_save=["2", "4"]))  # one of them a Conv1D
    adapter = spectune.extract(model).bind(model)
    config, tensors, _ = contents(adapter)
    assert sorted(config["modules_to_save"]) == ["2", "4"]
    for name in ("2", "4"):
        H = adapter.layers[name].terms[0].trained["H"]
        held = H.T if name == "2" else H
        assert torch.equal(tensors[f"{PREFIX}{name}.weight"], held)
        assert torch.equal(tensors[f"{PREFIX}{name}.bias"], adapter.layers[name].terms[0].trained["h"])
    own, _ = back(config, tensors)
    assert torch.equal(own["2.0.H"], adapter.layers["2"].terms[0].trained["H"])
    assert own["2.0.H"].is_contiguous()


def test_modules_that_are_brought_whole():
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    spectune.adapt(model, "svf", ["0"], modules_to_save=["1"])
    adapter = spectune.extract(moved(model)).bind(model)
    config, tensors, _ = contents(adapter)
    assert config["modules_to_save"] == ["1"]
    own, modules = back(config, tensors)
    (term,) = adapter.modules["1"]
    assert {key: own[f"1.0.whole.{key}"].tolist() for key in term.tensors} == {
        key: tensor.tolist() for key, tensor in term.tensors.items()
    }
    assert [entry.model_dump() for entry in modules["1"]] == [
        {"weight": 1.0, "tensors": ["bias", "weight"], "rows": None, "complete": True}
    ]


@pytest.mark.parametrize("why", ["a sum", "a weight", "a method of PEFT's", "two methods"])
def test_what_no_config_of_pefts_can_say_stays_in_our_words(why):
    adapter: Any = made("svf")
    if why == "a sum":
        adapter = made("svf") + made("pissa:rank=2")
    elif why == "a weight":
        adapter = 0.5 * made("pissa:rank=2")
    elif why == "a method of PEFT's":
        adapter = made("lora:rank=2")
    elif why == "two methods":
        adapter = made("svf", overrides={"4": "pissa:rank=2"})
    assert peft_type(adapter) is None
    config, tensors = {"format_version": 1}, {"0.0.z": torch.zeros(1)}
    assert in_peft_words(config, tensors, adapter) == (config, tensors)


def saved_by_peft(more, **said):
    """Return what `own_names` makes of a folder that PEFT saved after training."""
    config, tensors, _ = contents(made("svf"))
    config |= said
    return back(config, {**tensors, **{f"{PREFIX}{key}": tensor for key, tensor in more.items()}})


def test_what_peft_saves_beside_is_left_out_or_a_module():
    weight = torch.ones(9, 6)
    own, modules = saved_by_peft({
        "0.base_layer.weight": weight, "2.svf_base": torch.zeros(3, 16), "norm.weight": torch.ones(4),
        "lone.bias": torch.ones(2), "0.svf_z": torch.ones(6, dtype=torch.bfloat16),
    })  # fmt: skip
    assert "0.base_layer" not in modules
    assert "2.base" not in own  # of a model whose weights were not at hand
    assert own["0.0.z"].dtype == torch.float32
    assert torch.equal(own["norm.0.whole.weight"], torch.ones(4))
    found = {name: (entry.tensors, entry.complete) for name, (entry,) in modules.items()}
    assert found == {"norm": (["weight"], True), "lone": (["bias"], False)}


def test_rows_of_embeddings_are_put_in_order():
    values = torch.arange(6.0).reshape(3, 2)
    own, modules = saved_by_peft({f"emb.{TOKENS}": values}, trainable_token_indices={"emb": [7, 2, 5]})
    assert torch.equal(own["emb.0.whole.weight"], values[[1, 2, 0]])
    (entry,) = modules["emb"]
    assert (entry.rows, entry.complete) == ([2, 5, 7], False)
    with pytest.raises(SpectuneError, match="do not say which rows of 'emb' are trained"):
        saved_by_peft({f"emb.{TOKENS}": values}, trainable_token_indices={"other": [1]})


@pytest.mark.parametrize("more", [{"other": torch.ones(2)}, {TOKENS.rpartition(".")[2]: torch.tensor(1.0)}])
def test_rows_that_are_no_rows_are_refused(more):
    head = TOKENS.partition(".")[0]
    tensors = {f"emb.{TOKENS}": torch.ones(3, 2)} | {f"emb.{head}.{key}": tensor for key, tensor in more.items()}
    with pytest.raises(SpectuneError, match="hold something else than rows of 'emb'"):
        saved_by_peft(tensors, trainable_token_indices={"emb": [7, 2, 5]})


def test_adaloras_scores_are_for_who_trains_on_in_peft():
    config, tensors, _ = contents(made("adalora:rank=2"))
    scores = {f"{PREFIX}0.spectuneadalora_{key}": torch.ones(3) for key in ("step", "kept", "sensitivity_E")}
    own, _ = back(config, {**tensors, **scores})
    assert not any(key.startswith(("0.0.step", "0.0.kept", "0.0.sens")) for key in own)

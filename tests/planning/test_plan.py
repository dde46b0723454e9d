"""A plan from a config: what it says, and how it refuses."""

import json

import pytest

import spectune
from spectune import SpectuneError
from spectune.methods import METHODS, parse, to_text
from spectune.planning.memory import Parts, Weights
from spectune.planning.plan import default_methods, parse_devices
from spectune.planning.step import Cost
from training.folder import make_model

QUICK = {"precisions": ["bf16"], "measured": False, "batch_size": 2, "length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().config.save_pretrained(path)
    return str(path)


def test_counts_are_those_of_the_adapted_model(folder):
    rows = spectune.plan(folder, ["svf", "lora:rank=2", "dora:inner=svf", "full"], **QUICK).rows
    for row in rows:
        model = make_model()
        if row["method"] != "full":
            spectune.adapt(model, row["method"])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert row["trainable_parameters"] == trained


def test_targets_and_overrides_are_those_of_adapt(folder):
    where = {"targets": ["q_proj", "v_proj"], "overrides": {"v_proj": "svf"}}
    (row,) = spectune.plan(folder, ["lora:rank=2"], **where, **QUICK).rows
    model = spectune.adapt(make_model(), "lora:rank=2", **where)
    assert row["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert row["layers"] == 4


def test_every_method_is_there_by_default_with_its_defaults(folder, monkeypatch):
    monkeypatch.setattr("spectune.planning.planner.measure", lambda *_: Cost(1.0, 1.0, 1.0, 1.0, 1.0))
    found = spectune.plan("minilm-l6", **QUICK)
    assert [row["method"] for row in found.rows] == [m if m == "full" else to_text(parse(m)) for m in default_methods()]
    assert {row["method"] for row in found.rows} >= {"full", "dora:inner=pissa", *METHODS}
    small = spectune.plan(folder, **QUICK)  # a rank of 128 is above its smaller side
    assert any("pissa: 14 layers have less room than its rank" in note for note in small.notes)


@pytest.mark.parametrize("memory", [3_000, 5_500, 80_000])
def test_the_largest_batch_fits_and_the_next_does_not(memory):
    parts = Parts(Weights(1000, 0, 0, 0), 100, 50, 100, 50, (2000.0, 1500.0))
    rows = parts.largest_batch(1, memory)
    assert rows == 0 or parts.on(1, rows).total <= memory
    assert parts.on(1, rows + 1).total > memory


def test_full_fine_tuning_is_not_for_four_bits(folder):
    (row,) = spectune.plan(folder, ["full"], precisions=["fp32", "4bit"], measured=False, length=8).rows
    assert row["precisions"]["4bit"] is None
    assert row["precisions"]["fp32"]["memory"]["1"]["optimizer"] == 8 * row["trainable_parameters"]


def test_keras_has_a_row_of_its_own():
    rows = spectune.plan("gemma-7b", ["keras_lora:rank=8", "lora:rank=8"], targets=["q_proj", "v_proj"], **QUICK).rows
    assert [row["trainable_parameters"] for row in rows] == [22_134_784, 3_211_264]


def test_a_plan_is_json(folder):
    found = spectune.plan(folder, ["lora:rank=2"], memory="1GB", budget="10k", **QUICK).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["model"] == folder
    assert found["rows"][0]["precisions"]["bf16"]["memory"]["1"]["largest_batch"] > 0


def test_a_name_on_the_hub_finds_the_built_in_shapes():
    found = spectune.plan("meta-llama/Llama-2-7B", ["svf"], targets=["q_proj"], **QUICK)
    assert found.parameters == 6_738_415_616


def test_mistakes_are_told(folder, tmp_path):
    def says(match, *arguments, **more):
        with pytest.raises(SpectuneError, match=match):
            spectune.plan(*arguments, **{**QUICK, **more})

    says("unknown model 'lama-3-8b'; did you mean 'llama-3-8b'", "lama-3-8b")
    says("there is no model folder './nowhere'", "./nowhere")
    says("has no config.json", str(tmp_path))
    (tmp_path / "config.json").write_text("{]")
    says("is not understood", str(tmp_path))
    says("unknown method 'svv'", folder, ["svv"])
    says("'12 apples' is not a size", folder, memory="12 apples")
    says("'few' is not a number of parameters", folder, budget="few")
    says("unknown precision 'fp8'", folder, precisions=["fp8"])
    says("devices must be", folder, devices=[0])
    says("length must be at least 1", folder, length=0)
    says(r"supervised must be a share", folder, supervised=0.0)
    says("keras_lora has no field|has no field 'width'", folder, ["keras_lora:width=3"])


def test_a_memory_too_small_for_the_weights_says_what_would_do():
    match = "the weights of llama-3-70b alone take 141 GB in bf16 on each of 1 device, and 24 GB was given; "
    match += "what would fit: 4-bit weights .*, or 7 devices, or a smaller model"
    with pytest.raises(SpectuneError, match=match):
        spectune.plan("llama-3-70b", ["svf"], memory="24GB", **QUICK)


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("1,8", [1, 8]), ("1-3", [1, 2, 3])])
def test_devices(text, counts):
    assert parse_devices(text) == counts


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1-99999"])
def test_malformed_devices(text):
    with pytest.raises(SpectuneError, match="devices: "):
        parse_devices(text)

"""A plan's rows from costs that are known: what each parameter takes, and what lies on a line through two."""

import pytest
import torch

import spectune
from spectune import SpectuneError
from spectune.planning import planner
from spectune.planning.machine import this_machine
from spectune.planning.step import Cost
from training.folder import make_model

WHERE = {"targets": ["q_proj", "v_proj"], "precisions": ["fp32", "bf16"], "measured": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().config.save_pretrained(path)
    return str(path)


@pytest.fixture
def passes(monkeypatch):
    """Have a pass cost what its rows say, half as much without an adapter; return the passes."""
    seen = []

    def measure(model, methods, batch, dtype, machine):
        seen.append((methods if isinstance(methods, str) else "adapter", batch.rows, dtype))
        size = dtype.itemsize * batch.rows
        seconds = (3.0 if methods != "floor" else 1.5) * (1 + batch.rows)
        return Cost(seconds, 1.0, 1000.0 + 10 * size, 1.0, 1000.0 + 20 * size)

    monkeypatch.setattr(planner, "measure", measure)
    return seen


def row(folder, method="svf", **more):
    found = spectune.plan(folder, [method], **{**WHERE, "batch_size": 6, "length": 8, **more})
    return found, found.rows[0]


def test_times_and_activations_lie_on_the_line_through_two_passes(folder, passes):
    found, one = row(folder, batch_size=1000, length=1024)
    assert {rows for _, rows, _ in passes} == {4, 5}  # of 4,096 tokens at most, and of one row more
    assert len(passes) == len(set(passes))  # each once
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        of = one["precisions"][name]
        assert of["step_seconds"] == pytest.approx(3.0 * 1001)
        assert of["step_over_floor"] == pytest.approx(2.0)
        assert of["memory"]["1"]["activations"] == 1000 + 10 * dtype.itemsize * 1000
    assert found.floor_seconds == {"fp32": pytest.approx(1501.5), "bf16": pytest.approx(1501.5)}


def test_what_is_held_for_each_trained_parameter(folder, passes):
    model = make_model()
    whole = sum(p.numel() for p in model.parameters())
    scored = row(folder, "adalora:rank=2")[1]["trainable_parameters"]  # of P, E and Q, and not of a magnitude
    for method, scores in (("lora:rank=2", 0), ("adalora:rank=2", scored), ("dora:inner=adalora,rank=2", scored)):
        _, one = row(folder, method)
        count = one["trainable_parameters"]
        held = one["precisions"]["fp32"]["memory"]["1"]
        assert one["trainable_share"] == pytest.approx(count / whole)
        assert (held["trained"], held["gradients"]) == (4 * count, 4 * count)
        assert held["optimizer"] == 8 * count + 8 * scores  # two moments of each, and two scores


def test_all_of_a_model_trains_in_the_dtype_of_its_weights(folder, passes):
    _, one = row(folder, "full", precisions=["fp32", "bf16", "8bit"])
    whole = sum(p.numel() for p in make_model().parameters())
    assert (one["trainable_parameters"], one["trainable_share"], one["layers"]) == (whole, 1.0, None)
    for name, size in (("fp32", 4), ("bf16", 2)):
        held = one["precisions"][name]["memory"]["1"]
        assert (held["trained"], held["optimizer"], held["gradients"]) == (0, 2 * size * whole, size * whole)
    assert one["precisions"]["8bit"] is None


def test_a_model_that_cannot_be_passed_is_counted_all_the_same(folder, monkeypatch):
    def measure(*_):
        raise SpectuneError("its code needs numbers")

    monkeypatch.setattr(planner, "measure", measure)
    found, one = row(folder)
    of = one["precisions"]["bf16"]
    assert (of["step_seconds"], of["step_over_floor"], of["memory"]["1"]["activations"]) == (None, None, None)
    assert set(of["memory"]["1"]["fits"].values()) == {None}
    assert one["trainable_parameters"] == 2 * 32 + 2 * 16  # a factor for each singular value
    assert [note for note in found.notes if "numbers" in note] == [
        "its code needs numbers; its activations and step are not known"
    ]


def test_the_largest_batch_is_the_last_that_fits(folder, passes):
    _, one = row(folder, memory="1MB", precisions=["bf16"])
    held = one["precisions"]["bf16"]["memory"]["1"]
    largest = held["largest_batch"]
    totals = []
    for rows in (largest, largest + 1):
        _, other = row(folder, precisions=["bf16"], batch_size=rows)
        totals.append(other["precisions"]["bf16"]["memory"]["1"]["total"])
    assert totals[0] <= 10**6 < totals[1]


@pytest.mark.parametrize(
    ("method", "budget", "kept"),
    [
        ("lora:rank=4", "512", {"method": "lora:rank=2", "trainable_parameters": 448}),
        ("lora:rank=2", "2k", {"method": "lora", "trainable_parameters": 8 * 224}),
        ("full", "1M", "all"),
    ],
)
def test_what_keeps_a_budget(folder, passes, method, budget, kept):
    """LoRA on two layers of 32 x 32 and two of 16 x 32 has 2 (64 + 48) = 224 parameters for each rank."""
    _, one = row(folder, method, budget=budget)
    if kept == "all":
        kept = {"method": "full", "trainable_parameters": sum(p.numel() for p in make_model().parameters())}
    assert one["budget"] == kept
    assert one["smallest"] == (224 if method != "full" else kept["trainable_parameters"])


def test_a_budget_below_everything_names_the_least(folder, passes):
    with pytest.raises(SpectuneError, match=r"of lora:rank=4 trains as few as 10 parameters.*is 224 by"):
        row(folder, "lora:rank=4", budget="10")


def test_decompositions_take_what_the_machine_says_for_each_shape(folder, passes):
    _, one = row(folder, "pissa:rank=2")
    machine = this_machine(False)
    method = spectune.PiSSA(rank=2)
    expected = machine.setup(method, 32, 32, 2) + machine.setup(method, 16, 32, 2)
    assert one["setup_seconds"] == pytest.approx(expected)
    assert one["layers"] == 4

"""What weights take in memory, packed and not."""

import pytest
import torch

import spectune
import tiny
from spectune import SpectuneError
from spectune.planning.memory import NF4, precision_of_run, weights_of


def test_memory_adds_up_and_shards():
    row = spectune.plan("minilm-l6", ["lora"], precisions=["fp32", "4bit"], devices=[1, 2], measured=False).rows[0]
    one, two = (row["precisions"]["fp32"]["memory"][n] for n in "12")
    parts = one["weights"] + one["bases"] + one["trained"] + one["optimizer"]
    assert one["total"] == parts + one["step"]
    assert max(one["activations"], one["gradients"]) <= one["step"] <= one["activations"] + one["gradients"]
    assert one["trained"] == 4 * row["trainable_parameters"]
    assert one["optimizer"] == 2 * one["trained"]
    assert two["activations"] == one["activations"]
    assert two["optimizer"] * 2 == pytest.approx(one["optimizer"], abs=1)
    assert row["precisions"]["4bit"]["memory"]["1"]["weights"] < one["weights"] / 2


def test_what_a_packed_base_takes():
    model = tiny.llama()
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    rest = 2 * (sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in layers))
    rest += sum(b.numel() * b.element_size() for b in model.buffers())
    four, beside, eight = (weights_of(model, p) for p in ("4bit", "4bit:rank=16", "8bit"))
    assert four.packed == beside.packed == eight.packed == sum(w.numel() for w in layers)
    assert four.total == pytest.approx(rest + NF4 * four.packed)
    assert beside.total - four.total == sum(2 * min(16, *w.shape) * sum(w.shape) for w in layers)
    assert eight.total == rest + eight.packed + sum(4 * len(w) for w in layers)
    with pytest.raises(
        SpectuneError, match=r"unknown precision '8bit:rank=4' \(known: fp32, bf16, 4bit, 8bit, 4bit:rank"
    ):
        spectune.plan("minilm-l6", precisions=["8bit:rank=4"])


def test_experts_in_one_tensor_stay_unpacked():
    model = tiny.mixtral()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert experts
    assert weights_of(model, "4bit").packed < sum(p.numel() for p in model.parameters()) - experts
    assert weights_of(model, "4bit").total > 2 * experts


def test_a_runs_precision():
    said = [precision_of_run(q, "bf16") for q in (None, "nf4", "nf4:rank=16,refine=2", "int8")]
    assert said == ["bf16", "4bit", "4bit:rank=16", "8bit"]
    assert precision_of_run(None, "auto") is None

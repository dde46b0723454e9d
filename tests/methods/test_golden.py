"""Outputs of PEFT 0.21.2 on weights written by formula, computed once and stored.

How: nn.Linear(5, 6) in float64 with weight, bias and input of `wave` below, adapted by peft.get_peft_model (LoraConfig
r=2, lora_alpha=3; use_rslora, use_dora, init_lora_weights="pissa"; AdaLoraConfig init_r=3, lora_alpha=6), its
factors then set by `wave` too, run in eval mode.  PEFT's PiSSA starts in float32.  AdaLoRA divides by rank + 1e-5.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn as nn

import spectune
from spectune import AdaLoRA, DoRA, LoRA, PiSSA


def wave(*shape, step):
    """sin(step), sin(2 step), ..., in rows."""
    values = [math.sin(step * (k + 1)) for k in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def linear() -> Any:
    model = nn.Sequential(nn.Linear(5, 6)).double()
    with torch.no_grad():
        model[0].weight.copy_(wave(6, 5, step=0.7))
        model[0].bias.copy_(wave(6, step=1.3))
    return model


LORA = {"A": wave(2, 5, step=0.9), "B": wave(6, 2, step=1.1)}
CASES = {
    "lora": (
        LoRA(rank=2, alpha=3),
        LORA,
        [
            [4.742311856, -2.941850425, 0.225468797, 1.492894016, -4.106291639, 4.859370818],
            [3.64774668, -0.355235505, -1.18188636, -0.702810826, 1.713147499, -1.952055465],
        ],
    ),
    "rslora": (
        LoRA(rank=2, alpha=3, rslora=True),
        LORA,
        [
            [5.617020394, -4.003308092, 0.600098305, 2.113411915, -5.211272101, 5.539417392],
            [4.217538461, -0.022361963, -2.143471043, 0.096102953, 1.734408879, -2.775993936],
        ],
    ),
    "dora": (
        DoRA(LoRA(rank=2, alpha=3)),
        LORA | {"magnitude": 1.5 + wave(6, step=0.5)},
        [
            [2.975126356, -2.612868557, 2.375466024, 2.147653313, -2.544951043, 2.758035203],
            [2.392449458, -0.272381153, -2.345176326, -0.653037732, 1.171905107, -0.346130722],
        ],
    ),
    "adalora": (
        AdaLoRA(rank=2, initial_rank=3, alpha=6),
        {"Q": wave(3, 5, step=0.9), "P": wave(6, 3, step=1.1), "E": wave(3, step=0.8)},
        [
            [5.623878016, -3.142202503, 1.784423701, -2.107327794, 0.249655771, 1.985450578],
            [3.502487154, -3.024856045, 3.594505031, -5.613935458, 5.096969611, -3.764801353],
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_pefts(case):
    method, values, expected = CASES[case]
    model = spectune.adapt(linear(), method)
    (update,) = model[0].adapters["default"]
    assert {k: v.shape for k, v in update.trained().items()} == {k: v.shape for k, v in values.items()}
    with torch.no_grad():
        for key, value in update.trained().items():
            value.copy_(values[key])
    tolerance = 3e-5 if case == "adalora" else 2e-9
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(model(wave(2, 5, step=0.37)), expected, rtol=0, atol=tolerance)


def test_pissa_starts_where_pefts_does():
    """PEFT's B times 1.25 and A times 0.5, after its PiSSA start: signs of the vectors cancel."""
    model = spectune.adapt(linear(), PiSSA(rank=2, alpha=3))
    layer = model[0]
    (update,) = layer.adapters["default"]
    tensors = layer.tensors(update)
    with torch.no_grad():
        tensors["dB"].copy_(0.25 * tensors["B0"])
        tensors["dA"].copy_(-0.5 * tensors["A0"])
    expected = torch.tensor(
        [
            [2.005445842, -0.043727478, -0.682266609, -0.334525977, -0.818475519, 2.385449191],
            [1.781426828, -0.530976603, 0.454328227, -1.976020273, 1.119306333, 0.397646112],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(model(wave(2, 5, step=0.37)), expected, rtol=0, atol=2e-6)

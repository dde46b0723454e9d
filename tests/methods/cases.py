"""The methods and layers that the tests of this folder run over."""

from typing import Any

import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

import spectune
from spectune import SVF, SVFT, AdaLoRA, DoRA, LoRA, LoRAXS, MiLoRA, PiSSA
from spectune.methods import to_text

ADDITIVE = [
    LoRA(rank=4, alpha=8),
    LoRA(rank=4, alpha=8, rslora=True),
    SVF(),
    SVF(parametrization="sigmoid", max_mult=2.0),
    SVFT(),
    SVFT(pattern="banded", width=2),
    SVFT(pattern="random", width=2),
    SVFT(pattern="top_k", width=2),
    SVFT(pattern="banded", width=2, gate=True),
    SVFT(pattern="random", width=1, gate=True, seed=3),
    PiSSA(rank=4),
    PiSSA(rank=4, alpha=10),
    MiLoRA(rank=4, dropout=0.0),
    LoRAXS(rank=4),
    LoRAXS(rank=4, alpha=6),
    AdaLoRA(rank=4, total_steps=20),
    AdaLoRA(rank=4, initial_rank=5, alpha=3),
    spectune.VeRA(rank=4),
    spectune.VeRA(rank=15, seed=1),
]
EVERY = ADDITIVE + [DoRA(method) for method in ADDITIVE]
CHANGES_AT_START = ("sigmoid", "gate", "lora_xs")


def name(method):
    return to_text(method).replace("parametrization=", "").replace("pattern=", "")


def starts_at_base(method):
    return not any(word in name(method) for word in CHANGES_AT_START)


LAYERS = {
    "tall": lambda: nn.Linear(9, 12),
    "wide": lambda: nn.Linear(12, 9, bias=False),
    "square": lambda: nn.Linear(10, 10),
    "conv1d": lambda: Conv1D(12, 9),
}


def adapted(kind, method, dtype=torch.float64, *, trained=True) -> tuple[Any, Any]:
    """Return a one-layer model, adapted, and its layer; with `trained`, away from where the method starts."""
    model = nn.Sequential(LAYERS[kind]()).to(dtype)
    for parameter in model.parameters():  # Conv1D starts at 0.02 randn and a zero bias
        nn.init.normal_(parameter, std=0.4)
    spectune.adapt(model, method)
    if trained:
        with torch.no_grad():
            for parameter in model[0].adapters.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, model[0]

"""A small network with an AdaLoRA whose budget falls within 20 steps, and its training."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from spectune import AdaLoRA

STEPS, LAYERS, RANK, FIRST = 20, 3, 2, 4
METHOD = AdaLoRA(
    rank=RANK, initial_rank=FIRST, total_steps=STEPS, t_init=3, t_final=5, interval=4, gamma=0.3, beta2=0.7
)


def network() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def data():
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(12, 6, dtype=torch.float64, generator=generator),
            torch.randn(12, 5, dtype=torch.float64, generator=generator),
        )
        for _ in range(STEPS)
    ]


def updates(model):
    return [m for m in model.modules() if hasattr(m, "sensitivity_E")]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def kept(model):
    return sum(int((update.E != 0).sum()) for update in updates(model))


def train(model, batches, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=0.02)
    for x, y in batches:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer

"""A model that reads a weight past its layer."""

import torch.nn as nn
import torch.nn.functional as F


class Reads(nn.Module):
    """Calls one layer, and takes the weight of the other for a product of its own, whose dtype it asks before."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(module, x):
        x = module.called(x.to(module.read.weight))
        return F.linear(x, module.read.weight, module.read.bias)

"""A layer with three adapters, and what it answers to rows of them together and one by one."""

from typing import Any

import torch
import torch.nn as nn
from hypothesis import strategies as st

import spectune

NAMES = ("a", "b", "c")
weights = st.floats(-2, 2).map(lambda w: round(w, 2))
choice = st.one_of(st.none(), st.sampled_from(NAMES), st.dictionaries(st.sampled_from(NAMES), weights))


def layer(method, dtype=torch.float32) -> Any:
    """Return a model of one layer with three adapters, away from where they start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16)).to(dtype)
    for adapter in NAMES:
        spectune.adapt(model, method, name=adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def alone(model, x, choices):
    """Return what each row's choice answers when it is the only one."""
    rows = []
    for i, choice in enumerate(choices):
        spectune.activate(model, choice)
        rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


def routed(model, x, choices, **kept):
    with spectune.route(model, choices, **kept):
        return model(x)

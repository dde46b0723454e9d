"""What the checks share: a tiny model and its adapter, by Spectune's own call and as a config in PEFT."""

import torch
from peft import get_peft_model

import spectune
import spectune.peft
import tiny

ROWS = torch.arange(3, 75).view(8, 9)
KINDS = ["adapt", "peft"]


def base(**more):
    return tiny.llama(initializer_range=0.2, **more)


def adapted(model, kind):
    """Return a model with SVF on it."""
    if kind == "adapt":
        return spectune.adapt(model, spectune.SVF())
    return get_peft_model(model, spectune.peft.SVFConfig())


def adapter_of(model):
    return spectune.extract(model)


def trained(model):
    return {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def moved(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model

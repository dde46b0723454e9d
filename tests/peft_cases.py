"""What the tests of configs in PEFT share: a model with an adapter that was moved, and what it answers."""

import copy

import torch
from peft import PeftModel, get_peft_model

x = torch.arange(3, 21).view(2, 9)


def trained(model, config, name="default", seed=1, **more):
    """Return a model with an adapter that was moved."""
    config = copy.deepcopy(config)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
    else:
        model = get_peft_model(model, config, adapter_name=name, **more)
    return moved(model, name, seed)


def moved(model, name="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if key.endswith(f".{name}"):
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(x).logits


def kinds(model):
    return [type(module) for module in model.modules()]

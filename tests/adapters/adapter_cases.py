"""What the tests of this folder share: adapters away from where they start, and models to put them on."""

from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import spectune
from spectune import Adapter
from spectune.adapters.folder import WEIGHTS
from spectune.layers.adapted import adapted_layers

METHODS = [
    "lora:rank=3",
    "lora:rank=3,rslora=true,alpha=5",
    "svf",
    "svf:parametrization=sigmoid",
    "svft",
    "svft:pattern=banded,width=2",
    "svft:pattern=random,width=1,seed=3",
    "svft:pattern=top_k,width=1,gate=true",
    "pissa:rank=2",
    "milora:rank=2,alpha=3",
    "lora_xs:rank=3",
    "adalora:rank=2",
    "vera:rank=3",
    "dora:rank=2",
    "dora:inner=svf",
    "dora:inner=pissa,rank=2",
    "dora:inner=svft,pattern=banded,width=1",
]


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tall, a square and a wide layer, one of them a Conv1D."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), Conv1D(9, 9), nn.Tanh(), nn.Linear(9, 5))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def moved(model: Any, scale: float = 0.2, seed: int = 1) -> Any:
    """Move every adapter on a model away from where its method starts."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=drawn))
    return model


def made(method: Any, model: Any = None, seed: int = 1, scale: float = 0.2, **options: Any) -> Adapter:
    """Return an adapter of this method bound to `small()`, or to the model that is given and is left as it was."""
    model = small() if model is None else model
    spectune.adapt(model, method, name="made", **options)
    adapter = spectune.extract(moved(model, scale, seed), "made")
    spectune.detach(model, "made")
    return adapter.bind(model)


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return every layer's dense update, float64."""
    return {name: adapter.delta(name).double() for name in adapter.layers}


def assert_same_update(ours: Adapter, theirs: Any, tolerance: float = 1e-5) -> None:
    """Check that two adapters (or one and dense updates) have the same layers and updates."""
    found, expected = deltas(ours), deltas(theirs) if isinstance(theirs, Adapter) else theirs
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= tolerance * (1 + delta.norm()), name


def assert_identical(ours: Adapter, theirs: Adapter, *, bases: bool = False) -> None:
    assert (ours.base_model, ours.error, list(ours.layers)) == (theirs.base_model, theirs.error, list(theirs.layers))
    mine, its = ([layer.conv1d for layer in a.layers.values()] for a in (ours, theirs))
    assert mine == its or all(mine) or all(its)  # PEFT has one flag for all
    for name, layer in ours.layers.items():
        other = theirs.layers[name]
        assert layer.shape == other.shape
        assert [(t.method, t.weight) for t in layer.terms] == [(t.method, t.weight) for t in other.terms]
        for a, b in zip(layer.terms, other.terms, strict=True):
            pairs = [(a.trained, b.trained)] + ([(a.basis or {}, b.basis or {})] if bases else [])
            for mine, its in pairs:
                assert mine.keys() == its.keys()
                assert all(torch.equal(v, its[k]) and v.dtype == its[k].dtype for k, v in mine.items())


def resave(path: Any, change: Any) -> None:
    """Change a folder's tensors and leave out the digest, as another tool would."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)

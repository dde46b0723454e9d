"""What adapting holds while it decomposes: each layer's frozen tensors, and of decompositions one at a time."""

import gc
import weakref
from typing import Any

import pytest
import torch

import spectune
from spectune.model import install
from spectune.spectral import decompose_each


@pytest.mark.parametrize("cached", [False, True])
def test_no_decomposition_waits_for_the_others(cached, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path) if cached else "off")
    layers = {str(i): torch.nn.Linear(24, 24, bias=False) for i in range(6)}
    alive: list[weakref.ref[Any]] = []
    most: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        for name, found in decompose_each(*args, **options):
            gc.collect()
            alive.append(weakref.ref(found.L))
            most.append(sum(ref() is not None for ref in alive))
            yield name, found
            del found

    monkeypatch.setattr(install, "decompose_each", watched)
    for _ in range(2):
        model = spectune.adapt(torch.nn.ModuleDict(layers).to(torch.bfloat16), "svf")
        spectune.detach(model)
    assert len(most) == 12
    assert max(most) <= 2


def test_a_vector_of_the_cache_does_not_hold_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path))
    for _ in range(2):
        model = spectune.adapt(torch.nn.ModuleDict({"a": torch.nn.Linear(24, 24)}).to(torch.bfloat16), "svf")
        layer: Any = model["a"]
        for basis in layer.bases.values():
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in basis.tensors().values())
        spectune.detach(model)

"""Write small adapters of the present formats, with what each does: `python tests/adapters/formats/keep.py FOLDER`.

Run once when a format gets another version; what it wrote stays in `kept/`, and every later release must read it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import spectune

METHODS = {
    "svf": "svf",
    "svft": "svft:pattern=banded,width=2",
    "lora_xs": "lora_xs:rank=2",
    "pissa": "pissa:rank=2",
    "vera": "vera:rank=2",
    "adalora": "adalora:rank=2",
    "dora": "dora:inner=svf",
    "lora": "lora:rank=2",
}


def model_of(tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """Return the model that the kept adapters are of."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 5))
    if tensors is not None:
        model.load_state_dict(tensors)
    return model.eval()


def made(method: str, seed: int) -> Any:
    """Return an adapter with values of its own."""
    model = model_of()
    spectune.adapt(model, method)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=drawn)
    return spectune.extract(model)


def main(folder: Path) -> None:
    """Write the base, and each adapter with its dense updates."""
    folder.mkdir(parents=True, exist_ok=True)
    base = model_of()
    save_file(base.state_dict(), folder / "base.safetensors")
    adapters = {name: made(method, len(name)) for name, method in METHODS.items()}
    adapters["sum"] = 0.5 * adapters["svf"] + 0.25 * adapters["lora"]
    for name, adapter in adapters.items():
        adapter.save(folder / name)
        spectune.attach(base, adapter, "kept")
        bound = spectune.extract(base, "kept")
        deltas = {layer: bound.delta(layer).float().contiguous() for layer in bound.layers}
        save_file(deltas, folder / name / "deltas.safetensors")
        spectune.detach(base, "kept")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

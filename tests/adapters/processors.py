"""What the tests of two processors run in a process of its own: processors.py FOLDER."""

import sys
from pathlib import Path

import torch
import torch.nn as nn

import spectune
from spectral.spectra import orthonormal, weight_like, with_spectrum

METHODS = ["svf", "svf:parametrization=sigmoid", "svft:pattern=banded,width=2", "svft:pattern=top_k,width=1"]
METHODS += ["pissa:rank=8", "milora:rank=8", "lora_xs:rank=8", "vera:rank=8", "adalora:rank=4", "dora:inner=svf"]
METHODS += ["dora:inner=pissa,rank=8", "lora:rank=4", "dora:rank=4"]
WEIGHTS = {
    "trained": lambda: weight_like(96, 64),
    "wide": lambda: weight_like(64, 200),
    "noise": lambda: torch.randn(80, 80, generator=torch.Generator().manual_seed(1)),
    "rank three": lambda: with_spectrum(80, 60, torch.tensor([5.0, 2.0, 1.0])),
    "orthogonal": lambda: orthonormal(64, 64).float(),
    "clusters": lambda: with_spectrum(90, 70, torch.tensor([3.0] * 20 + [1.0] * 30 + [0.5] * 20)),
}
EQUAL = ("orthogonal", "clusters")  # singular values


def base(folder: Path, weight: str) -> nn.Sequential:
    """Return a model with a weight that is the same for both."""
    W = torch.load(folder / f"{weight}.pt")
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(W)
    return model


def place(folder: Path, side: str, weight: str, method: str) -> Path:
    """Return where an adapter is."""
    return folder / side / f"{weight} {METHODS.index(method)}"


def make(folder: Path, side: str) -> None:
    """Save an adapter of every method on every weight, away from where it starts, and the dW that it is."""
    for weight in WEIGHTS:
        for method in METHODS:
            model = base(folder, weight)
            torch.manual_seed(1)
            spectune.adapt(model, method)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            adapter = spectune.extract(model)
            adapter.save(place(folder, side, weight, method))
            torch.save(adapter.delta("0"), place(folder, side, weight, method) / "delta.pt")


def differences(folder: Path, side: str) -> dict[tuple[str, str], float]:
    """Attach what `make` saved, and return by how much of its length each dW comes out otherwise."""
    found = {}
    for weight in WEIGHTS:
        for method in METHODS:
            path = place(folder, side, weight, method)
            model = base(folder, weight)
            spectune.attach(model, spectune.Adapter.load(path))
            made, here = torch.load(path / "delta.pt"), spectune.extract(model).delta("0")
            found[weight, method] = float((here - made).norm() / made.norm())
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.save(differences(where, "here"), where / "differences.pt")
    make(where, "there")

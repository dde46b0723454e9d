"""An adapter trained on one processor attaches on another, where decompositions are rounded otherwise.

The other processor is a process in which every library keeps to what a processor without vector units can do, on two
threads, whose sums are in another order.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import spectune
from adapters import processors

TESTS = Path(__file__).parents[1]
OTHER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
OTHER |= {"OMP_NUM_THREADS": "2", "SPECTUNE_CACHE": "off"}
TOLERANCE = 3e-4  # of the length of dW; 3e-5 was the most that was seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters made here and attached there, and others made there."""
    path = tmp_path_factory.mktemp("processors")
    for name, weight in processors.WEIGHTS.items():
        torch.save(weight(), path / f"{name}.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTUNE_CACHE", "off")
        processors.make(path, "here")
    script, paths = TESTS / "adapters" / "processors.py", [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **OTHER, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, script, path], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_an_adapter_from_here_is_the_same_there(folder):
    found = torch.load(folder / "differences.pt")
    assert found.keys() == {(weight, method) for weight in processors.WEIGHTS for method in processors.METHODS}
    assert {key: value for key, value in found.items() if value > TOLERANCE} == {}


def test_an_adapter_from_there_is_the_same_here(folder, monkeypatch):
    monkeypatch.setenv("SPECTUNE_CACHE", "off")
    found = processors.differences(folder, "there")
    assert {key: value for key, value in found.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("weight", processors.WEIGHTS)
def test_only_vectors_that_rounding_chooses_are_stored(folder, weight):
    for method in ("svf", "pissa:rank=8", "lora_xs:rank=8", "dora:inner=svf"):
        with safe_open(processors.place(folder, "here", weight, method) / "adapter_model.safetensors", "pt") as file:
            stored = [key for key in file.keys() if "basis" in key]  # noqa: SIM118
        assert bool(stored) == (weight in processors.EQUAL)


def test_vectors_of_one_base_that_come_out_otherwise_are_refused(folder):
    """As where the basis was not stored, and the processor chose others."""
    model = processors.base(folder, "orthogonal")
    spectune.adapt(model, "svf")
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapter = spectune.extract(model)
    basis = model[0].bases["svf"]
    Q = torch.linalg.qr(torch.randn(64, 64))[0]
    adapter.save(folder / "turned", bases="embed")
    loaded = spectune.Adapter.load(folder / "turned")
    term = loaded.layers["0"].terms[0]
    term.basis.update({"L": basis.L @ Q, "R": Q.T @ basis.R})  # W = L R all the same
    with pytest.raises(spectune.SpectuneError, match=r"does not reproduce its update on '0'.*bases=\"embed\""):
        spectune.attach(processors.base(folder, "orthogonal"), loaded)

"""Every version of the adapters' format is read: folders that were written when it was new."""

from pathlib import Path

import pytest
import torch
from keep import model_of
from safetensors.torch import load_file

import spectune
from spectune import Adapter

KEPT = Path(__file__).with_name("kept")
FOLDERS = sorted(path.parent for path in KEPT.rglob("adapter_config.json"))


def test_every_version_is_kept():
    assert {folder.parent.name for folder in FOLDERS} == {"1", "2"}
    assert len(FOLDERS) == 18


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_kept_adapter_does_what_it_did(folder, tmp_path):
    model = model_of(load_file(folder.parent / "base.safetensors"))
    expected = load_file(folder / "deltas.safetensors")
    for place in (folder, Adapter.load(folder).save(tmp_path / "again")):
        spectune.attach(model, Adapter.load(place), "kept")
        found = spectune.extract(model, "kept")
        assert found.layers.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found.delta(name).float(), delta, rtol=1e-4, atol=1e-5)
        spectune.detach(model, "kept")

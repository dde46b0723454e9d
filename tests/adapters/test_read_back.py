"""What could not be loaded again is not written, and what is there stays."""

from pathlib import Path

import pytest
import torch
import torch.nn as nn

import spectune
from spectune import SVF, Adapter, LoRA, SpectuneError
from spectune.adapters.terms import WholeTerm


def adapter(method: spectune.Method) -> Adapter:
    torch.manual_seed(0)
    return spectune.extract(spectune.adapt(nn.Sequential(nn.Linear(6, 5)), method))


@pytest.mark.parametrize("method", [SVF(), LoRA(2)], ids=["spectune", "peft"])
def test_a_save_is_read_before_it_replaces_anything(method: spectune.Method, tmp_path: Path) -> None:
    good = adapter(method)
    good.save(tmp_path / "a")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    bad = adapter(method)
    if method == SVF():
        bad.modules = {"embed": (WholeTerm({"weight": torch.zeros(2, 4)}, rows=(3, 1)),)}
        told = "rows of 'embed' do not fit"
    else:
        bad.modules = {"embed": (WholeTerm({"weight": torch.zeros(2, 4, dtype=torch.complex64)}, complete=True),)}
        told = "complex64, which no adapter has"
    with pytest.raises(SpectuneError, match=f"cannot be saved, since it could not be loaded again: .*{told}"):
        bad.save(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files
    assert Adapter.load(tmp_path / "a").layers.keys() == good.layers.keys()


def test_a_folder_that_a_save_makes_is_not_made_for_one_that_fails(tmp_path: Path) -> None:
    bad = adapter(SVF())
    bad.modules = {"embed": (WholeTerm({"weight": torch.zeros(2, 4)}, rows=(3, 1)),)}
    with pytest.raises(SpectuneError, match="could not be loaded again"):
        bad.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()

"""Going through a checkpoint: what is kept, gone on from, begun anew and left out."""

import numpy as np
import pytest
import torch

from spectrum.checkpoints import matrix, saved, tensors
from spectune.errors import SpectuneError
from spectune.spectrum import collect as module
from spectune.spectrum.checkpoint import open_checkpoint
from spectune.spectrum.collect import collect


@pytest.fixture
def folder(tmp_path):
    return str(saved(tmp_path / "model", tensors()))


def test_values_are_those_of_the_weights_raised(folder, tmp_path):
    values, problems = collect(open_checkpoint(folder), tmp_path)
    assert problems == {}
    for name, S in values.items():
        exact = torch.linalg.svdvals(tensors()[name].double()).numpy()
        assert np.abs(S - exact).max() < 1e-6 * exact[0]


def test_a_killed_run_goes_on_and_measures_nothing_twice(folder, tmp_path, monkeypatch):
    checkpoint, real = open_checkpoint(folder), module.singular_values
    calls = []

    def until_the_third(W):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(W)

    monkeypatch.setattr(module, "singular_values", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        collect(checkpoint, tmp_path)
    (file,) = tmp_path.glob("values-*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])  # killed while it wrote the second
    told = []
    values, _ = collect(checkpoint, tmp_path, progress=lambda done, total, at: told.append((done / total, at)))
    assert len(calls) == 3 + 5  # all but the first again
    assert told[0][0] > 0
    assert told[-1] == (1.0, "")
    assert len(values) == 6
    assert len(file.read_text().splitlines()) == 1 + 6
    before = file.read_bytes()
    collect(open_checkpoint(folder), tmp_path)
    assert (len(calls), file.read_bytes()) == (8, before)


def test_another_checkpoint_is_not_mistaken_for_this_one(folder, tmp_path):
    first, _ = collect(open_checkpoint(folder), tmp_path)
    changed = {name: 2 * t if t.dim() == 2 else t for name, t in tensors(3).items()}
    saved(tmp_path / "model", changed)
    second, _ = collect(open_checkpoint(folder), tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert len(second) == 9
    np.testing.assert_allclose(second[name], 2 * first[name], rtol=1e-6)


def test_a_tensor_that_is_not_finite_is_left_out_and_tried_again(tmp_path):
    held = tensors()
    bad = "model.layers.1.self_attn.q_proj.weight"
    held[bad][3, 4] = torch.nan
    checkpoint = open_checkpoint(str(saved(tmp_path / "model", held)))
    for _ in range(2):
        values, problems = collect(checkpoint, tmp_path)
        assert set(problems) == {bad}
        assert "not finite" in problems[bad]
        assert len(values) == 5


def test_a_checkpoint_without_a_sound_matrix(tmp_path):
    held = {"a.weight": torch.full((4, 4), torch.inf)}
    checkpoint = open_checkpoint(str(saved(tmp_path / "model", held)))
    with pytest.raises(SpectuneError, match=r"no matrix .* can be measured; a\.weight: .*not finite"):
        collect(checkpoint, tmp_path)


def test_one_matrix_is_held_at_a_time(tmp_path):
    import weakref

    checkpoint = open_checkpoint(str(saved(tmp_path / "model", {f"{i}.weight": matrix(30, 20, i) for i in range(4)})))
    alive: list[weakref.ref] = []

    def watched(read):
        assert all(ref() is None for ref in alive)
        W = read()
        alive.append(weakref.ref(W))
        return W

    matrices = [m._replace(read=lambda read=m.read: watched(read)) for m in checkpoint.matrices]
    collect(checkpoint._replace(matrices=matrices), tmp_path)
    assert len(alive) == 4

"""VeRA, the ninth method, which needed no other file than its own."""

import hashlib

import torch
import torch.nn as nn
from cases import adapted

import spectune


def test_the_random_matrices_are_the_same_everywhere_and_shared_by_shape():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6))
    spectune.adapt(model, spectune.VeRA(rank=16))
    first, other, last = (layer.bases["vera-16-0"] for layer in model)
    assert first.A.data_ptr() == last.A.data_ptr()
    assert first.B.data_ptr() == last.B.data_ptr()
    assert (first.A.shape, other.A.shape, other.B.shape) == ((16, 8), (16, 6), (8, 16))
    digest = hashlib.sha256(first.A.numpy().tobytes() + first.B.numpy().tobytes()).hexdigest()
    assert digest.startswith("24835087ffdbe4e6")
    assert (6 / 8) ** 0.5 * 0.9 < first.A.abs().max() <= (6 / 8) ** 0.5
    assert (6 / 16) ** 0.5 * 0.9 < first.B.abs().max() <= (6 / 16) ** 0.5


def test_it_starts_at_the_papers_values_and_trains_two_vectors():
    _, layer = adapted("tall", spectune.VeRA(rank=20), torch.float32, trained=False)
    (update,) = layer.adapters["default"]
    assert update.trained().keys() == {"b", "d"}
    assert torch.equal(update.b, torch.zeros(12))
    assert torch.equal(update.d, torch.full((20,), 0.1))
    assert spectune.VeRA(rank=20).parameter_count(12, 9) == 32


def test_it_is_saved_and_loaded_without_its_matrices(tmp_path):
    model, layer = adapted("tall", spectune.VeRA(rank=20), torch.float32)
    x = torch.randn(3, 9)
    y = model(x)
    spectune.extract(model).save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20 * 12 * 4
    spectune.detach(model)
    assert not torch.allclose(model(x), y)
    spectune.attach(model, spectune.Adapter.load(tmp_path))
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert layer.bases["vera-20-0"].A.shape == (20, 9)

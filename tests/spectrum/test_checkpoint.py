"""Which matrices a checkpoint has, and what is said of the rest."""

import pytest
import torch

from spectrum.checkpoints import LINEAR, matrix, read_all, same, saved, tensors
from spectune.errors import SpectuneError
from spectune.spectrum.checkpoint import open_checkpoint


def test_one_file_without_embeddings_norms_and_biases(tmp_path):
    held = tensors()
    checkpoint = open_checkpoint(str(saved(tmp_path, held)))
    same(read_all(checkpoint), {name: held[name] for name in LINEAR})
    assert checkpoint.skipped == {}
    (down, *_) = (m for m in checkpoint.matrices if m.place.kind == "down_proj" and m.place.layer == 1)
    assert (down.shape, down.dtype) == ((16, 24), "F16")
    assert open_checkpoint(str(tmp_path / "model.safetensors")).matrices


def test_targets_and_exclude(tmp_path):
    folder = str(saved(tmp_path, tensors()))
    assert {m.place.kind for m in open_checkpoint(folder, ["up_proj", "q_proj"]).matrices} == {"up_proj", "q_proj"}
    assert len(open_checkpoint(folder, r"model\.layers\.1\..*", ["mlp.up_proj"]).matrices) == 2
    assert len(open_checkpoint(folder, ["embed_tokens"]).matrices) == 1
    with pytest.raises(SpectuneError, match="'up_prj' matches no linear layer; did you mean 'up_proj'"):
        open_checkpoint(folder, ["up_prj"])
    with pytest.raises(SpectuneError, match="nothing is left to measure"):
        open_checkpoint(folder, ["up_proj"], ["up_proj"])


def test_conv1d_is_turned_round(tmp_path):
    held = {"h.0.attn.c_attn.weight": matrix(8, 24), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    (found,) = open_checkpoint(str(saved(tmp_path, held, model_type="gpt2"))).matrices
    assert found.shape == (24, 8)
    assert torch.equal(found.read(), held["h.0.attn.c_attn.weight"].T)


def test_stacked_experts_are_a_matrix_each(tmp_path):
    held = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack([matrix(8, 12, i) for i in range(3)]),
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.ones(3, 8),
        "model.layers.1.mlp.experts.1.w1.weight": matrix(8, 12, 7),
        "vision.patch.weight": torch.ones(2, 3, 4, 4),
    }
    checkpoint = open_checkpoint(str(saved(tmp_path, held)))
    names = [f"model.layers.0.mlp.experts.gate_up_proj[{i}]" for i in range(3)]
    assert [m.name for m in checkpoint.matrices] == [*names, "model.layers.1.mlp.experts.1.w1.weight"]
    assert torch.equal(checkpoint.matrices[2].read(), matrix(8, 12, 2))
    assert [(m.place.expert, m.place.stacked) for m in checkpoint.matrices] == [(0, 1), (1, 1), (2, 1), (1, 0)]
    assert "4 dimensions" in checkpoint.skipped["vision.patch.weight"]


def test_packed_weights_are_left_out_with_their_scales(tmp_path):
    held = {
        "layers.0.up.qweight": torch.ones(4, 8, dtype=torch.int32),
        "layers.0.up.scales": torch.ones(2, 8, dtype=torch.float16),
        "layers.0.down.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        "layers.0.down.weight_scale_of_its_own": torch.ones(1, 1),
        "layers.0.q.weight": matrix(8, 8),
    }
    checkpoint = open_checkpoint(str(saved(tmp_path, held)))
    assert [m.name for m in checkpoint.matrices] == ["layers.0.q.weight"]
    assert set(checkpoint.skipped) == {"layers.0.up.qweight", "layers.0.down.weight"}
    assert "dequantize" in checkpoint.skipped["layers.0.down.weight"]


def test_the_fingerprint_changes_with_the_file(tmp_path):
    folder = str(saved(tmp_path, tensors()))
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    saved(tmp_path, tensors(3))
    assert open_checkpoint(folder).fingerprint != first

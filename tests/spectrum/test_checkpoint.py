"""Which matrices a checkpoint has, in every format, and what is said of the rest."""

import pickle

import pytest
import torch

from spectrum.checkpoints import gguf, matrix, saved, sharded, tensors
from spectune.errors import SpectuneError
from spectune.spectrum.checkpoint import open_checkpoint

LINEAR = {name for name in tensors() if name.endswith("proj.weight")}


def read_all(checkpoint):
    return {m.name: m.read() for m in checkpoint.matrices}


def same(found, held):
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)


def test_one_file_without_embeddings_norms_and_biases(tmp_path):
    held = tensors()
    checkpoint = open_checkpoint(str(saved(tmp_path, held)))
    same(read_all(checkpoint), {name: held[name] for name in LINEAR})
    assert checkpoint.skipped == {}
    (down, *_) = (m for m in checkpoint.matrices if m.place.kind == "down_proj" and m.place.layer == 1)
    assert (down.shape, down.dtype) == ((16, 24), "F16")
    assert open_checkpoint(str(tmp_path / "model.safetensors")).matrices


def test_shards(tmp_path):
    folder, _ = sharded(tmp_path, tensors())
    same(read_all(open_checkpoint(str(folder))), {name: tensors()[name] for name in LINEAR})


def test_an_unreadable_shard_is_named_by_its_tensors(tmp_path):
    folder, files = sharded(tmp_path, tensors())
    lost = "model.layers.1.mlp.up_proj.weight"
    path = folder / files[lost]
    path.write_bytes(path.read_bytes()[:-10])
    checkpoint = open_checkpoint(str(folder))
    assert {m.name for m in checkpoint.matrices} == LINEAR - {lost}
    assert list(checkpoint.skipped) == [lost]
    assert files[lost] in checkpoint.skipped[lost]


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


def test_gguf_is_dequantized(tmp_path):
    held = {
        "token_embd.weight": matrix(64, 32),
        "blk.0.attn_q.weight": matrix(64, 32, 1),
        "blk.0.ffn_down_exps.weight": torch.stack([matrix(32, 64, i) for i in (2, 3)]),
        "blk.1.attn_q.weight": matrix(64, 32, 4),
        "output.weight": matrix(64, 32, 5),
        "output_norm.weight": torch.ones(32),
    }
    checkpoint = open_checkpoint(str(gguf(tmp_path / "model.gguf", held)))
    assert {m.dtype for m in checkpoint.matrices} == {"F16", "F32", "Q8_0"}
    expected = {"blk.0.attn_q.weight": held["blk.0.attn_q.weight"], "blk.1.attn_q.weight": held["blk.1.attn_q.weight"]}
    expected |= {f"blk.0.ffn_down_exps.weight[{i}]": held["blk.0.ffn_down_exps.weight"][i] for i in (0, 1)}
    found = read_all(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert (found[name] - tensor).abs().max() < 0.02
    with pytest.raises(SpectuneError, match=r"name the one to read, .*model\.gguf"):
        open_checkpoint(str(tmp_path))


def test_gguf_of_a_type_with_scales_of_whole_tensors(tmp_path):
    held = {f"blk.0.{name}.weight": matrix(64, 64, i) for i, name in enumerate(("attn_q", "attn_k"))}
    held["blk.0.ffn_up_exps.weight"] = torch.stack([matrix(64, 64, i) for i in (2, 3)])
    bare = read_all(open_checkpoint(str(gguf(tmp_path / "bare.gguf", held, ["NVFP4", "MXFP4", "NVFP4"]))))
    held |= {"blk.0.attn_q.scale": torch.tensor([3.0]), "blk.0.ffn_up_exps.scale": torch.tensor([0.5, 7.0])}
    kinds = ["NVFP4", "MXFP4", "NVFP4", "F32", "F32"]
    scaled = read_all(open_checkpoint(str(gguf(tmp_path / "scaled.gguf", held, kinds))))
    factors = {"blk.0.attn_q.weight": 3.0, "blk.0.ffn_up_exps.weight[0]": 0.5, "blk.0.ffn_up_exps.weight[1]": 7.0}
    assert same_names(scaled, bare)
    for name, tensor in bare.items():
        assert torch.equal(scaled[name], tensor * factors.get(name, 1.0))


def same_names(a, b):
    return a.keys() == b.keys() and len(a) == 4


def test_gguf_in_a_type_that_nothing_here_reads(tmp_path):
    held = {"blk.0.attn_q.weight": matrix(64, 128), "blk.0.attn_k.weight": matrix(64, 128)}
    found = open_checkpoint(str(gguf(tmp_path / "model.gguf", held, ["F32", "Q1_0"])))
    assert [m.name for m in found.matrices] == ["blk.0.attn_q.weight"]
    assert "stored as Q1_0" in found.skipped["blk.0.attn_k.weight"]


def test_gguf_in_several_files(tmp_path):
    for number in (1, 2):
        held = {f"blk.{number}.attn_q.weight": matrix(64, 32, number)}
        gguf(tmp_path / f"model-{number:05}-of-00002.gguf", held)
    named = str(tmp_path / "model-00001-of-00002.gguf")
    assert len(open_checkpoint(named).matrices) == 2
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(SpectuneError, match=r"one of 2 files, and model-00002-of-00002\.gguf is not beside it"):
        open_checkpoint(named)


def test_bin_only_when_allowed_and_never_code(tmp_path):
    held = tensors()
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(SpectuneError, match="allow it with --bin"):
        open_checkpoint(str(tmp_path))
    same(read_all(open_checkpoint(str(tmp_path), allow_bin=True)), {name: held[name] for name in LINEAR})
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return ran.touch, ()

    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"a.weight": Evil()}))
    torch.save({"a.weight": Evil()}, tmp_path / "evil.pt")
    torch.save({"a.weight": Evil()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=False)
    for file in ("evil.bin", "evil.pt", "evil.pth"):
        with pytest.raises(SpectuneError, match="cannot be read"):
            open_checkpoint(str(tmp_path / file), allow_bin=True)
    assert not ran.exists()


def test_a_bin_in_the_format_before_zip_files(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    same(read_all(open_checkpoint(str(tmp_path), allow_bin=True)), {name: tensors()[name] for name in LINEAR})
    whole = path.read_bytes()
    for size in (0, 7, 40, 400, len(whole) - 10):  # in the header, the pickle and the values
        path.write_bytes(whole[:size])
        with pytest.raises(SpectuneError, match=r"pytorch_model\.bin cannot be read"):
            open_checkpoint(str(tmp_path), allow_bin=True)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_weights_of_a_bin_may_lie_one_level_down(tmp_path, key):
    torch.save({"epoch": 3, "loss": torch.ones(1), key: tensors()}, tmp_path / "a.bin")
    checkpoint = open_checkpoint(str(tmp_path / "a.bin"), allow_bin=True)
    same(read_all(checkpoint), {name: tensors()[name] for name in LINEAR})


def test_a_bin_without_tensors_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "net": tensors()}, tmp_path / "a.bin")
    with pytest.raises(SpectuneError, match="holds 'epoch', 'net' and no tensors by name"):
        open_checkpoint(str(tmp_path / "a.bin"), allow_bin=True)


def test_the_fingerprint_changes_with_the_file(tmp_path):
    folder = str(saved(tmp_path, tensors()))
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    saved(tmp_path, tensors(3))
    assert open_checkpoint(folder).fingerprint != first


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(SpectuneError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(SpectuneError, match="there is no model folder"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(SpectuneError, match="neither here nor on the hub"):
        open_checkpoint("nobody/nothing")

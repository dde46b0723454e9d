"""Checkpoints in every format, in one file and in several, and what is no checkpoint."""

import pickle

import pytest
import torch

from spectrum.checkpoints import LINEAR, gguf, matrix, read_all, same, sharded, tensors
from spectune.errors import SpectuneError
from spectune.spectrum.checkpoint import open_checkpoint


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


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(SpectuneError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(SpectuneError, match="there is no model folder"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(SpectuneError, match="neither here nor on the hub"):
        open_checkpoint("nobody/nothing")

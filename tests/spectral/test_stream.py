"""Checkpoints, one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from spectra import weight_like

from spectune.errors import SpectuneError
from spectune.spectral import Request, stream, svd


@pytest.fixture
def tensors():
    return {
        "embed.weight": weight_like(90, 30, 1).bfloat16(),
        "layer.up.weight": weight_like(80, 30, 2),
        "layer.norm.weight": torch.ones(30),
        "layer.packed": torch.zeros(30, 15, dtype=torch.uint8),
        "layer.down.weight": weight_like(30, 80, 3),
    }


@pytest.fixture
def sharded(tensors, tmp_path):
    names = list(tensors)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_sharded_checkpoint(sharded, tensors):
    found = {item.name: item for item in stream(sharded)}
    assert set(found) == {"embed.weight", "layer.up.weight", "layer.down.weight"}
    for name, item in found.items():
        assert item.shape == tuple(tensors[name].shape)
        assert torch.equal(item.result.S, svd(tensors[name]).S)


def test_a_file_an_index_and_a_folder(sharded, tensors, tmp_path):
    assert [item.name for item in stream(sharded / "model-1.safetensors")] == ["embed.weight", "layer.up.weight"]
    assert len(list(stream(sharded / "model.safetensors.index.json"))) == 3
    single = tmp_path / "single"
    single.mkdir()
    save_file(tensors, single / "weights.safetensors")
    assert len(list(stream(single))) == 3


def test_requests_and_selection(sharded, tensors):
    (item,) = stream(sharded, Request("top", 3), select=lambda name, shape: "up" in name and shape == (80, 30))
    assert torch.equal(item.result.S, svd(tensors["layer.up.weight"], 3, "top").S)


def test_packed_weights_are_refused_by_name(sharded):
    with pytest.raises(SpectuneError, match=r"'layer\.packed' cannot be decomposed: .*packed or quantized"):
        list(stream(sharded, select=lambda name, shape: "packed" in name))


def test_what_is_not_a_checkpoint_is_said(sharded, tmp_path):
    with pytest.raises(SpectuneError, match="there is no checkpoint"):
        list(stream(tmp_path / "missing"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SpectuneError, match="holds no safetensors checkpoint"):
        list(stream(empty))
    (empty / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(SpectuneError, match="cannot be read as safetensors"):
        list(stream(empty))
    (empty / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SpectuneError, match="not an index of shards"):
        list(stream(empty))
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(SpectuneError, match=r"model-2\.safetensors"):
        list(stream(sharded))


MEASURE = """
    import resource, sys
    import torch
    torch.set_num_threads(1)
    from spectune.spectral import Request, stream
    for item in stream(sys.argv[1], Request("full"), select=lambda name, shape: shape[0] < 100):
        pass  # LAPACK and BLAS take what they take
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for item in stream(sys.argv[1], Request(sys.argv[2], 16 if sys.argv[2] == "top" else None)):
        del item
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "factor"), [("top", 3), ("one_sided", 9), ("full", 10)])
def test_peak_memory_is_a_few_matrices_not_the_model(kind, factor, tmp_path):
    largest = 2048 * 1536 * 4
    save_file(
        {"small": torch.eye(20)} | {str(i): weight_like(2048, 1536, i) for i in range(12)},
        tmp_path / "model.safetensors",
    )
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path), kind]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout)
    assert peak < factor * largest + 8 * 2**20

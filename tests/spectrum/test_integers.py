"""Weights of published checkpoints in 2 to 8 bits: the values that GPTQ, AWQ, compressed-tensors and MLX load."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spectune.errors import SpectuneError
from spectune.spectrum.checkpoint import open_checkpoint
from spectune.spectrum.integers import unpacked

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def numbers(rows, columns, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint32)


def stream(values, bits):
    """Return rows of numbers as rows of words that their bits fill without a gap, the lowest first."""
    as_bits = (values[..., None] >> np.arange(bits, dtype=np.uint32)) & 1
    words = np.packbits(as_bits.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(words).view("<u4")


def words(array):
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32))


def read(folder, tensors, config=None):
    """Return the matrices of a checkpoint by name, and what was left out."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(str(folder))
    return {m.name: (m.read(), m) for m in found.matrices}, found.skipped


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_numbers_in_words(bits):
    values = numbers(5, 64, bits)
    found = unpacked(words(stream(values, bits)), bits, 64, 1)
    assert np.array_equal(found.numpy(), values)
    assert np.array_equal(unpacked(words(stream(values, bits)).mT, bits, 64, 0).numpy(), values.T)


# -- GPTQ


def gptq(bits, groups=4, shuffled=False, less=1, dtype=np.float16):
    """Return the tensors of a layer (out 32 x in 64) as GPTQ's packing has them, and its values."""
    q, z = numbers(64, 32, bits), numbers(groups, 32, bits, 1)
    z = np.maximum(z, 1) if less else z
    scales = np.random.default_rng(2).uniform(0.01, 0.1, (groups, 32)).astype(dtype)
    of = np.arange(64) // (64 // groups)
    of = np.random.default_rng(3).permutation(of) if shuffled else of
    tensors = {
        "qweight": words(stream(q.T, bits).T),
        "qzeros": words(stream(z - less, bits)),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(of.astype(np.int32)),
    }
    return tensors, (scales[of] * (q.astype(np.int32) - z[of].astype(np.int32)).astype(dtype)).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(tmp_path, bits, shuffled):
    tensors, expected = gptq(bits, shuffled=shuffled)
    found, skipped = read(tmp_path, {f"{Q}.{key}": t for key, t in tensors.items()})
    values, matrix = found.pop(f"{Q}.weight")
    assert (matrix.shape, matrix.dtype, found, skipped) == ((32, 64), f"GPTQ{bits}", {}, {})
    assert values.dtype is torch.float16
    assert np.array_equal(values.numpy(), expected)


def test_gptq_of_the_second_format_and_without_an_order(tmp_path):
    tensors, expected = gptq(4, less=0)
    del tensors["g_idx"]
    config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}
    found, _ = read(tmp_path, {f"{Q}.{key}": t for key, t in tensors.items()}, config)
    assert np.array_equal(found[f"{Q}.weight"][0].numpy(), expected)


# -- AWQ


def awq():
    q, z = numbers(64, 32, 4), numbers(4, 32, 4, 1)
    scales = np.random.default_rng(2).uniform(0.01, 0.1, (4, 32)).astype(np.float16)

    def pack(values):  # AutoAWQ's order: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on
        out = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= values[:, column::8] << np.uint32(4 * i)
        return words(out)

    of = np.arange(64) // 16
    expected = (q.astype(np.int32) - z[of].astype(np.int32)).astype(np.float16) * scales[of]
    return {"qweight": pack(q), "qzeros": pack(z), "scales": torch.from_numpy(scales)}, expected.T


def test_awq(tmp_path):
    tensors, expected = awq()
    found, skipped = read(tmp_path, {f"{Q}.{key}": t for key, t in tensors.items()})
    values, matrix = found.pop(f"{Q}.weight")
    assert (matrix.shape, matrix.dtype, found, skipped) == ((32, 64), "AWQ4", {}, {})
    assert np.array_equal(values.numpy(), expected)


def test_awq_is_autoawqs(tmp_path):
    dequantize = pytest.importorskip("awq.utils.packing_utils").dequantize_gemm
    tensors, _ = awq()
    expected = dequantize(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 16)
    found, _ = read(tmp_path, {f"{Q}.{key}": t for key, t in tensors.items()})
    assert torch.equal(found[f"{Q}.weight"][0], expected.T)


# -- compressed-tensors


def pack_quantized(bits, inputs=61, groups=1, asymmetric=False, shuffled=False, dtype=torch.bfloat16):
    q, n = numbers(20, inputs, bits), 32 // bits

    def pack(values):
        rows = np.zeros((len(values), -(-values.shape[1] // n)), np.uint32)
        for i in range(n):
            column = values[:, i::n]
            rows[:, : column.shape[1]] |= column << np.uint32(bits * i)
        return words(rows)

    offset, of = 1 << (bits - 1), np.arange(inputs) // (inputs // groups)
    of = np.random.default_rng(3).permutation(of) if shuffled else of
    scale = torch.from_numpy(np.random.default_rng(2).uniform(0.01, 0.1, (20, groups))).to(dtype)
    values = torch.from_numpy(q.astype(np.int32) - offset).to(dtype)
    tensors = {"packed": pack(q), "scale": scale, "shape": torch.tensor([20, inputs])}
    if asymmetric:
        z = numbers(20, groups, bits, 4)
        tensors["zero_point"] = pack(z.T).T.contiguous()
        values = values - torch.from_numpy(z.astype(np.int32) - offset).to(dtype)[:, of]
    if shuffled:
        tensors["g_idx"] = torch.from_numpy(of.astype(np.int32))
    return tensors, values * scale[:, of]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 8, "inputs": 60, "groups": 5},
        {"bits": 4, "inputs": 64, "groups": 4, "asymmetric": True},
        {"bits": 4, "inputs": 64, "groups": 4, "shuffled": True},
        {"bits": 3, "inputs": 60, "groups": 2, "dtype": torch.float16},
    ],
    ids=str,
)
def test_compressed_tensors_pack_quantized(tmp_path, options):
    tensors, expected = pack_quantized(**options)
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": options["bits"]}}}}}
    found, skipped = read(tmp_path, {f"{Q}.weight_{key}": t for key, t in tensors.items()}, config)
    values, matrix = found.pop(f"{Q}.weight")
    assert (matrix.dtype, found, skipped) == (f"INT{options['bits']}", {}, {})
    assert values.dtype is expected.dtype
    assert torch.equal(values, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_pack_quantized_is_that_of_the_library(tmp_path, bits, asymmetric):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=16, symmetric=not asymmetric)
    offset = 1 << (bits - 1)
    q = torch.from_numpy(numbers(20, 64, bits).astype(np.int16) - offset).to(torch.int8)
    zero = torch.from_numpy(numbers(20, 4, bits, 1).astype(np.int16) - offset).to(torch.int8) if asymmetric else None
    scale = torch.rand(20, 4).to(torch.bfloat16)
    expected = forward.dequantize(q, scale, zero, args=args)
    tensors = {"packed": pack(q, bits), "scale": scale, "shape": torch.tensor([20, 64])}
    if zero is not None:
        tensors["zero_point"] = pack(zero, bits, packed_dim=0).contiguous()
    found, _ = read(tmp_path, {f"{Q}.weight_{key}": t for key, t in tensors.items()})
    assert torch.equal(found[f"{Q}.weight"][0], expected)


# -- MLX


def mlx(bits, size, dtype=torch.float16):
    q = numbers(16, 128, bits)
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(16, 128 // size, generator=generator) / 50).to(dtype)
    biases = -torch.rand(16, 128 // size, generator=generator).to(dtype) / 10
    spread = torch.arange(128) // size
    values = torch.from_numpy(q.astype(np.int32)).to(dtype) * scales[:, spread] + biases[:, spread]
    return {"weight": words(stream(q, bits)).view(torch.uint32), "scales": scales, "biases": biases}, values


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mlx(tmp_path, bits, dtype):
    tensors, expected = mlx(bits, 64, dtype)
    others, alone = mlx(8, 32, dtype)
    tensors = {f"{Q}.{key}": t for key, t in tensors.items()} | {f"{K}.{key}": t for key, t in others.items()}
    config = {"quantization": {"group_size": 64, "bits": bits, K: {"group_size": 32, "bits": 8}}}
    found, skipped = read(tmp_path, tensors, config)
    assert {name: matrix.dtype for name, (_, matrix) in found.items()} == {
        f"{Q}.weight": f"MLX{bits}",
        f"{K}.weight": "MLX8",
    }
    assert not skipped
    assert torch.equal(found[f"{Q}.weight"][0], expected)
    assert torch.equal(found[f"{K}.weight"][0], alone)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_mlx_is_that_of_the_library(tmp_path, bits, dtype):
    core = pytest.importorskip("mlx.core")
    weight = core.array(np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)).astype(
        getattr(core, dtype)
    )
    packed, scales, biases = core.quantize(weight, group_size=64, bits=bits)
    tensors = {f"{Q}.weight": packed, f"{Q}.scales": scales, f"{Q}.biases": biases}
    core.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 64, "bits": bits}}))
    (matrix,) = open_checkpoint(str(tmp_path)).matrices
    expected = core.dequantize(packed, scales, biases, group_size=64, bits=bits).astype(core.float32)
    assert np.array_equal(matrix.read().float().numpy(), np.array(expected))


# -- what is not known


def test_packings_that_do_not_fit_are_named(tmp_path):
    tensors, _ = gptq(4)
    whole = {"a.b.weight": torch.rand(4, 4)}
    broken = {f"{Q}.{key}": t for key, t in tensors.items()}
    for key, tensor in (
        ("qzeros", tensors["qzeros"][:2]),
        ("scales", tensors["scales"][:, :8]),
        ("g_idx", words(numbers(1, 5, 4))),
    ):
        found, skipped = read(tmp_path, {**broken, f"{Q}.{key}": tensor.contiguous(), **whole})
        assert list(found) == ["a.b.weight"]
        assert "packed or quantized" in skipped[f"{Q}.qweight"]
    found, skipped = read(tmp_path, {f"{Q}.{key}": t for key, t in mlx(4, 64)[0].items()} | whole)
    assert "packed or quantized" in skipped[f"{Q}.weight"]  # how large groups are, the shapes do not say
    with pytest.raises(SpectuneError, match="nothing is left to measure"):
        read(tmp_path, {f"{Q}.weight_{key}": t for key, t in pack_quantized(4)[0].items() if key != "shape"})


def test_an_order_of_groups_that_are_not_there_is_told(tmp_path):
    tensors, _ = gptq(4)
    tensors["g_idx"] = tensors["g_idx"] + 1
    save_file({f"{Q}.{key}": t for key, t in tensors.items()}, tmp_path / "model.safetensors")
    (matrix,) = open_checkpoint(str(tmp_path)).matrices
    with pytest.raises(SpectuneError, match="g_idx' names groups that are not there"):
        matrix.read()

"""Packed tensors of checkpoints: the values that the libraries which wrote them load."""

import pytest
import torch
from safetensors.torch import save_file

from spectune.spectrum.checkpoint import open_checkpoint

K = "model.layers.0.self_attn.k_proj"
Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.gate_up_proj"


def matrices(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(str(folder))
    return {m.name: m for m in found.matrices}, found.skipped


def fp8(rows, columns):
    torch.manual_seed(0)
    return torch.randn(rows, columns).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_blocks_are_transformers(tmp_path, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = fp8(256, 384), torch.rand(2, 3).to(dtype)
    found, skipped = matrices(tmp_path, {f"{Q}.weight": weight, f"{Q}.weight_scale_inv": scale})
    read = found[f"{Q}.weight"].read()
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale)
    assert read.dtype == expected.dtype
    assert torch.equal(read, expected)
    assert not skipped


def test_the_last_block_may_be_smaller(tmp_path):
    weight, scale = fp8(130, 200), torch.rand(2, 2)
    found, _ = matrices(tmp_path, {f"{Q}.weight": weight, f"{Q}.weight_scale_inv": scale})
    expected = weight.float()
    for i in range(2):
        for j in range(2):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    assert torch.equal(found[f"{Q}.weight"].read(), expected)


@pytest.mark.parametrize("weight", [fp8(6, 8), torch.arange(-24, 24, dtype=torch.int8).reshape(6, 8)])
@pytest.mark.parametrize("shape", [(6, 1), (1,), ()])
def test_scales_of_rows(tmp_path, weight, shape):
    scale = torch.rand(shape).to(torch.bfloat16)
    found, skipped = matrices(tmp_path, {f"{Q}.weight": weight, f"{Q}.weight_scale": scale})
    assert torch.equal(found[f"{Q}.weight"].read(), weight.to(torch.bfloat16) * scale)
    assert not skipped


def test_scales_of_rows_are_those_of_compressed_tensors(tmp_path):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs

    weight, scale = fp8(6, 8), torch.rand(6, 1).to(torch.bfloat16)
    found, _ = matrices(tmp_path, {f"{Q}.weight": weight, f"{Q}.weight_scale": scale})
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    assert torch.equal(found[f"{Q}.weight"].read(), forward.dequantize(weight, scale, args=args))


def test_mxfp4_experts_are_transformers(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 10, 2), dtype=torch.uint8)
    found, skipped = matrices(tmp_path, {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales})
    expected = convert_moe_packed_tensors(blocks, scales)
    assert set(found) == {f"{EXPERTS}[{i}]" for i in range(3)}
    for index in range(3):
        matrix = found[f"{EXPERTS}[{index}]"]
        assert matrix.shape == (64, 10)
        assert torch.equal(matrix.read(), expected[index])
    assert not skipped


# -- values in 4 bits, made here one by one


HALVES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def four_bits(rows, inputs, size, seed=0):
    """Return bytes with two values each, those values, and 8-bit scales of their groups."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, inputs), generator=generator)
    values = torch.tensor([[HALVES[c % 8] * (-1.0 if c > 7 else 1.0) for c in row] for row in codes.tolist()])
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    scales = (50 * torch.rand(rows, inputs // size, generator=generator)).to(torch.float8_e4m3fn)
    return packed, values, scales


def spread(scales, size):
    return scales.float().repeat_interleave(size, 1)


def test_nvfp4_of_compressed_tensors(tmp_path):
    packed, values, scales = four_bits(6, 64, 16)
    whole = torch.tensor([37.5])
    held = {"packed": packed, "scale": scales, "global_scale": whole}
    found, skipped = matrices(tmp_path, {f"{Q}.weight_{key}": t for key, t in held.items()})
    matrix = found.pop(f"{Q}.weight")
    assert (matrix.shape, matrix.dtype, found, skipped) == ((6, 64), "NVFP4", {}, {})
    assert torch.equal(matrix.read(), (values * (spread(scales, 16) / whole)).bfloat16())


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_four_bits_are_those_of_compressed_tensors(tmp_path, kind):
    base = pytest.importorskip(f"compressed_tensors.compressors.{kind}.base")
    from compressed_tensors.quantization import QuantizationScheme

    packed, _, scales = four_bits(6, 64, 16 if kind == "nvfp4" else 32)
    held = {"weight_packed": packed, "weight_scale": scales}
    if kind == "nvfp4":
        held["weight_global_scale"] = torch.tensor([37.5])
        args = {"strategy": "tensor_group", "group_size": 16}
    else:
        held["weight_scale"] = torch.randint(118, 132, scales.shape, dtype=torch.uint8)
        args = {"strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights={"num_bits": 4, "type": "float", **args})
    made = getattr(base, f"{kind.upper()}PackedCompressor").decompress(held, scheme)["weight"]
    found, _ = matrices(tmp_path, {f"{Q}.{key}": t for key, t in held.items()})
    read = found[f"{Q}.weight"].read()
    assert read.dtype is made.dtype
    assert torch.equal(read, made)


def test_nvfp4_of_modelopt(tmp_path):
    packed, values, scales = four_bits(6, 64, 16)
    whole = torch.tensor(0.0125)
    held = {"": packed, "_scale": scales, "_scale_2": whole}
    tensors = {f"{Q}.weight{key}": t for key, t in held.items()} | {f"{Q}.input_scale": torch.tensor(1.0)}
    many = [four_bits(6, 64, 16, seed) for seed in (1, 2, 3)]
    tensors[EXPERTS] = torch.stack([m[0].mT for m in many]).contiguous()
    tensors[f"{EXPERTS}_weight_scale"] = torch.stack([m[2].mT for m in many]).contiguous()
    tensors[f"{EXPERTS}_weight_scale_2"] = whole.clone()
    found, skipped = matrices(tmp_path, tensors)
    assert not skipped
    assert found.keys() == {f"{Q}.weight", *(f"{EXPERTS}[{i}]" for i in range(3))}
    assert torch.equal(found[f"{Q}.weight"].read(), values * (spread(scales, 16) * whole))
    for i, (_, own, beside) in enumerate(many):
        assert found[f"{EXPERTS}[{i}]"].shape == (64, 6)
        assert torch.equal(found[f"{EXPERTS}[{i}]"].read(), (own * (spread(beside, 16) * whole)).mT)


def test_nvfp4_is_that_of_modelopt(tmp_path):
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    packed, values, scales = four_bits(6, 64, 16)
    held = {"": packed, "_scale": scales, "_scale_2": torch.tensor(0.0125)}
    found, _ = matrices(tmp_path, {f"{Q}.weight{key}": t for key, t in held.items()})
    beside = {"scale": scales, "double_scale": held["_scale_2"], "block_sizes": {-1: 16}}
    made = tensor(values.shape, torch.float32, packed).dequantize(torch.float32, **beside)
    assert torch.equal(found[f"{Q}.weight"].read(), made)


def test_mxfp4_of_compressed_tensors(tmp_path):
    packed, values, _ = four_bits(6, 64, 32)
    exponents = torch.randint(110, 130, (6, 2), dtype=torch.uint8)
    found, skipped = matrices(tmp_path, {f"{Q}.weight_packed": packed, f"{Q}.weight_scale": exponents})
    expected = values * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 1)
    assert found[f"{Q}.weight"].dtype == "MXFP4"
    assert torch.equal(found[f"{Q}.weight"].read(), expected.bfloat16())
    assert not skipped


@pytest.mark.parametrize("scale", ["_scale", "_scale_inv"])
def test_scales_that_are_powers_of_two(tmp_path, scale):
    exponents = torch.randint(110, 130, (6, 2), dtype=torch.uint8)
    blocks = torch.randint(110, 130, (2, 1), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {f"{Q}.weight": fp8(6, 64), f"{Q}.weight{scale}": exponents}
    tensors |= {f"{K}.weight": fp8(200, 64), f"{K}.weight_scale_inv": blocks}
    found, skipped = matrices(tmp_path, tensors)
    expected = fp8(6, 64).float() * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(found[f"{Q}.weight"].read(), expected)
    rows = blocks.float().repeat_interleave(128, 0)[:200]
    assert torch.equal(found[f"{K}.weight"].read(), fp8(200, 64).float() * rows)
    assert not skipped


@pytest.mark.parametrize(("mode", "size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)])
def test_floats_of_mlx(tmp_path, mode, size, bits):
    packed, values, scales = four_bits(6, 64, size)
    if bits == 8:
        values = fp8(6, 64)
        packed, values = values.view(torch.uint8), values.float()
    if mode == "nvfp4":
        factors, scales = spread(scales, size), scales.view(torch.uint8)
    else:
        scales = torch.randint(118, 132, (6, 64 // size), dtype=torch.uint8)
        factors = 2.0 ** (scales.float() - 127).repeat_interleave(size, 1)
    words = packed.contiguous().view(torch.uint32)
    (tmp_path / "config.json").write_text(f'{{"quantization": {{"mode": "{mode}", "group_size": {size}}}}}')
    found, skipped = matrices(tmp_path, {f"{Q}.weight": words, f"{Q}.scales": scales})
    read = found[f"{Q}.weight"].read()
    assert torch.equal(read, (values * factors).bfloat16())
    assert not skipped
    try:
        import mlx.core as mx
    except ImportError:
        return
    arrays = [mx.array(t.numpy()) for t in (words, scales)]
    made = mx.dequantize(*arrays, group_size=size, bits=bits, mode=mode).astype(mx.float32)
    assert torch.equal(read.float(), torch.tensor(made.tolist()))


def test_what_is_not_known_is_told(tmp_path):
    tensors = {f"{Q}.weight": fp8(6, 8), f"{Q}.weight_scale_inv": torch.rand(4, 3), "a.b.weight": torch.rand(4, 4)}
    found, skipped = matrices(tmp_path, tensors)
    assert set(found) == {"a.b.weight"}
    assert "packed or quantized: dequantize it first" in skipped[f"{Q}.weight"]

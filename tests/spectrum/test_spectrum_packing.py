"""Packed tensors of checkpoints: the values that the libraries which wrote them load."""

import pytest
import torch
from safetensors.torch import save_file

from spectune.spectrum.checkpoint import open_checkpoint

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


def test_what_is_not_known_is_told(tmp_path):
    tensors = {f"{Q}.weight": fp8(6, 8), f"{Q}.weight_scale_inv": torch.rand(4, 3), "a.b.weight": torch.rand(4, 4)}
    found, skipped = matrices(tmp_path, tensors)
    assert set(found) == {"a.b.weight"}
    assert "packed or quantized: dequantize it first" in skipped[f"{Q}.weight"]

"""Checkpoints on disk, made to measure."""

import json

import numpy as np
import torch
from safetensors.torch import save_file


def matrix(out, into, seed=0):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


def tensors(layers=2):
    held = {"model.embed_tokens.weight": matrix(40, 16, 9), "model.norm.weight": torch.ones(16)}
    for i in range(layers):
        held[f"model.layers.{i}.self_attn.q_proj.weight"] = matrix(16, 16, 3 * i)
        held[f"model.layers.{i}.mlp.up_proj.weight"] = matrix(24, 16, 3 * i + 1).bfloat16()
        held[f"model.layers.{i}.mlp.down_proj.weight"] = matrix(16, 24, 3 * i + 2).half()
        held[f"model.layers.{i}.self_attn.q_proj.bias"] = torch.ones(16)
    return held


def saved(folder, held, **config):
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(folder, held):
    """Write a file a tensor, and their index."""
    folder.mkdir(exist_ok=True)
    files = {name: f"model-{i:05}.safetensors" for i, name in enumerate(sorted(held))}
    for name, file in files.items():
        save_file({name: held[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder, files


def gguf(path, held, kinds=("Q8_0", "F16", "F32")):
    """Write matrices in these types in turn."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, "llama")
    for i, (name, tensor) in enumerate(held.items()):
        kind = GGMLQuantizationType[kinds[i % len(kinds)]]
        if kind in (GGMLQuantizationType.NVFP4, GGMLQuantizationType.Q1_0):  # of which gguf makes none: any bytes
            size, taken = GGML_QUANT_SIZES[kind]
            shape = (*tensor.shape[:-1], tensor.shape[-1] // size * taken)
            writer.add_tensor(name, np.random.default_rng(i).integers(1, 100, shape, dtype=np.uint8), raw_dtype=kind)
            continue
        writer.add_tensor(name, quantize(np.asarray(tensor, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LINEAR = {name for name in tensors() if name.endswith("proj.weight")}


def read_all(checkpoint):
    return {m.name: m.read() for m in checkpoint.matrices}


def same(found, held):
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)

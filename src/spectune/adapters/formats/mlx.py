"""The folder that mlx_lm loads adapters from."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.formats.plain import loras_of
from spectune.errors import SpectuneError
from spectune.methods.dora import DoRA
from spectune.storage import publish, save_tensors, temporary_beside

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_BLOCKS = ".layers."


def save_mlx(adapter: Contents, path: Path) -> Path:
    """Write an adapter of LoRAs, or of DoRAs around them, of one rank and s = 1 as mlx_lm reads it.

    mlx_lm's y = W x + scale * (x lora_a) lora_b has lora_a = A^T (in x r), lora_b = B^T (r x out), and DoRA's m as is.

    Args:
        adapter: the adapter.
        path: the folder.

    Raises:
        SpectuneError: something of the adapter has no place there.
    """
    loras = loras_of(adapter, "mlx_lm", dora=True)
    kinds = {type(layer.terms[0].method) for layer in adapter.layers.values()}
    if len(kinds) > 1:
        raise SpectuneError("mlx_lm reads LoRA or DoRA, and the adapter has both: give a rank (--rank)")
    tensors: dict[str, Tensor] = {}
    for name, lora in loras.items():
        tensors |= {f"{name}.lora_a": lora.A.mT.contiguous(), f"{name}.lora_b": lora.B.mT.contiguous()}
        if lora.magnitude is not None:
            tensors[f"{name}.m"] = lora.magnitude
    keys = sorted({_key(name) for name in loras})
    rank = len(next(iter(loras.values())).A)
    config = {
        "fine_tune_type": "dora" if kinds == {DoRA} else "lora",
        "model": adapter.base_model,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path, folder=True) as folder:
        save_tensors(tensors, folder / WEIGHTS, {"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        publish(folder, path)
    return path


def _key(name: str) -> str:
    """Return a layer's name in its block, or its whole name outside of blocks."""
    before, blocks, rest = name.partition(_BLOCKS)
    number, _, key = rest.partition(".")
    return key if blocks and number.isdecimal() and "." not in before.removeprefix("model.") else name

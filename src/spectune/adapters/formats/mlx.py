"""The folder that mlx_lm loads adapters from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.formats.plain import loras_of
from spectune.errors import SpectuneError
from spectune.methods.dora import DoRA
from spectune.storage import publish, save_tensors, temporary_beside

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_BLOCK = re.compile(r"(?:\w+\.)?(?:layers|h)\.\d+\.(.+)")
# what transformers calls the blocks, and what mlx_lm does, where that is another name
_BLOCKS = {
    "gpt2": ("transformer.h.", "model.h."),
    "gptj": ("transformer.h.", "model.h."),
    "gpt_neox": ("gpt_neox.layers.", "model.h."),
}


def save_mlx(adapter: Contents, path: Path, config: PreTrainedConfig | None = None) -> Path:
    """Write an adapter of LoRAs, or of DoRAs around them, of one rank and s = 1 as mlx_lm reads it.

    mlx_lm's y = W x + scale * (x lora_a) lora_b has lora_a = A^T (in x r), lora_b = B^T (r x out), and DoRA's m as is.

    Args:
        adapter: the adapter.
        path: the folder.
        config: of the base model: of some, mlx_lm calls the layers otherwise than transformers.

    Raises:
        SpectuneError: something of the adapter has no place there, or the configuration is missed.
    """
    loras = loras_of(adapter, "mlx_lm", dora=True)
    kinds = {type(layer.terms[0].method) for layer in adapter.layers.values()}
    if len(kinds) > 1:
        raise SpectuneError("mlx_lm reads LoRA or DoRA, and the adapter has both: give a rank (--rank)")
    tensors: dict[str, Tensor] = {}
    loras = {_renamed(name, config): lora for name, lora in loras.items()}
    for name, lora in loras.items():
        tensors |= {f"{name}.lora_a": lora.A.mT.contiguous(), f"{name}.lora_b": lora.B.mT.contiguous()}
        if lora.magnitude is not None:
            tensors[f"{name}.m"] = lora.magnitude
    keys = sorted({_key(name) for name in loras})
    rank = len(next(iter(loras.values())).A)
    written = {
        "fine_tune_type": "dora" if kinds == {DoRA} else "lora",
        "model": adapter.base_model,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path, folder=True) as folder:
        save_tensors(tensors, folder / WEIGHTS, {"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        publish(folder, path)
    return path


def _renamed(name: str, config: PreTrainedConfig | None) -> str:
    """Return what mlx_lm calls a layer."""
    if config is not None:
        ours, theirs = _BLOCKS.get(config.model_type, ("", ""))
        return theirs + name.removeprefix(ours) if name.startswith(ours) else name
    if name.startswith(tuple(ours for ours, _ in _BLOCKS.values())):
        raise SpectuneError(f"mlx_lm's name of {name!r} goes by the model's type: give config=model.config")
    return name


def _key(name: str) -> str:
    """Return a layer's name in its block, or its whole name outside of blocks."""
    found = _BLOCK.fullmatch(name)
    return found[1] if found else name

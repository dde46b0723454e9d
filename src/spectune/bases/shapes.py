"""Models without their weights: built-in shapes, an embedded name or a folder, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectune.bases.embedded import EMBEDDED, package_file
from spectune.bases.loading import auto_class, check_config
from spectune.bases.quiet import quiet
from spectune.errors import SpectuneError, first_line, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


Shape = tuple[str, Mapping[str, object]]  # a model's type, and what differs from its default config


def _decoder(kind: str, hidden: int, middle: int, layers: int, heads: int, key_heads: int, **more: object) -> Shape:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }
    return kind, {**sizes, **more}


def _qwen3(*sizes: int, tied: bool = False) -> Shape:
    return _decoder("qwen3", *sizes, vocab_size=151_936, head_dim=128, tie_word_embeddings=tied)


_SMOLLM2 = {"vocab_size": 49_152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_LLAMA3 = {"vocab_size": 128_256, "max_position_embeddings": 8192}
_DEBERTA = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}

BUILT_IN: dict[str, Shape] = {
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": (
        "roberta",
        {
            **_ROBERTA,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "deberta-v3-base": ("deberta-v2", _DEBERTA),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gemma-2b": _decoder("gemma", 2048, 16_384, 18, 8, 1, head_dim=256),
    "gemma-7b": _decoder("gemma", 3072, 24_576, 28, 16, 16, head_dim=256),
    "gemma-2-9b": _decoder("gemma2", 3584, 14_336, 42, 16, 8, head_dim=256),
    "llama-2-7b": _decoder("llama", 4096, 11_008, 32, 32, 32, max_position_embeddings=4096),
    "llama-3-8b": _decoder("llama", 4096, 14_336, 32, 32, 8, **_LLAMA3),
    "llama-3-70b": _decoder("llama", 8192, 28_672, 80, 64, 8, **_LLAMA3),
    "mistral-7b": _decoder("mistral", 4096, 14_336, 32, 32, 8),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, 8),
    "smollm2-360m": _decoder("llama", 960, 2560, 32, 15, 5, **_SMOLLM2),
    "smollm2-1.7b": _decoder("llama", 2048, 8192, 24, 32, 32, **_SMOLLM2),
}
_EMBEDDED_GGUF = {"smollm2-135m": _decoder("llama", 576, 1536, 30, 9, 3, **_SMOLLM2)}
_DECODERS = ("llama", "gemma", "gemma2", "mistral", "qwen3", "gpt2")


def known() -> list[str]:
    """Return the names of the models that need no folder."""
    return sorted({*BUILT_IN, *EMBEDDED})


def find_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the transformers config of a built-in or embedded name, of the hub's, or of a folder with a config.json.

    What of the hub is on this machine is taken before a built-in shape of that name, and asked for after it.

    Raises:
        SpectuneError: an unknown name (the nearest are listed), a folder without config.json, or one that is not
            understood.
    """
    plain = name.lower().rpartition("/")[2]
    shapes = {**BUILT_IN, **_EMBEDDED_GGUF}
    is_folder = Path(name).is_dir()
    of_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not is_folder
    if plain in shapes and not is_folder and not (of_hub and _is_cached(name)):
        kind, values = shapes[plain]
        config = transformers.AutoConfig.for_model(kind, **values)
        if kind in _DECODERS:
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
        return config
    if name in EMBEDDED:
        folder = package_file(EMBEDDED[name].package, EMBEDDED[name].file).parent
    elif is_folder:
        folder = Path(name)
    elif of_hub:
        return _of_hub(name, trust_remote_code)
    else:
        what = "there is no model folder" if name.startswith((".", "/", "~")) else "unknown model"
        raise SpectuneError(f"{what} {name!r}{nearest(plain, known())} (known without a folder: {', '.join(known())})")
    if not (folder / "config.json").is_file():
        raise SpectuneError(f"{name!r} has no config.json: name the folder of a model that transformers saved")
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a broken file makes of transformers
        raise SpectuneError(f"the config.json of {name!r} is not understood: {first_line(error)}") from None


def _is_cached(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _of_hub(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the hub, its cache or a strange file makes of transformers
        raise SpectuneError(
            f"unknown model {name!r}{nearest(name.rpartition('/')[2], known())}: its config.json is not to be had from "
            f"the hub or its cache ({first_line(error).rstrip('.')}); known without it: {', '.join(known())}"
        ) from None


def build(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model of a config on the meta device: every module and shape, and no memory.

    Raises:
        SpectuneError: transformers makes no model of it.
    """
    check_config(config, str(getattr(config, "_name_or_path", "") or config.model_type))
    try:
        with torch.device("meta"), quiet():
            return auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a strange config makes of the model's code
        raise SpectuneError(
            f"no model can be built from a config of type {config.model_type!r}: {first_line(error)}"
        ) from None

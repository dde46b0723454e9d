"""The one file that diffusers' pipelines load LoRAs from: PEFT's tensors behind the name of a pipeline's component."""

from __future__ import annotations

import json
from pathlib import Path

from spectune.adapters.compress import to_scale_one
from spectune.adapters.contents import Contents
from spectune.adapters.formats.dialect import PREFIX
from spectune.adapters.formats.peft import peft_contents
from spectune.errors import SpectuneError
from spectune.storage import save_tensors, write_atomically

FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # the config, in the file itself
_SAID = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora", "lora_bias")
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_BY_CLASS = {"UNet": "unet", "Transformer": "transformer", "CLIPText": "text_encoder"}  # in the names of classes


def save_diffusers(adapter: Contents, path: Path, component: str | None) -> Path:
    """Write an adapter of LoRAs (DoRA around them is one) as the file that `load_lora_weights` reads.

    s is in B, so that the update is right for programs too that know no alpha, or lose it with the file's metadata.

    Args:
        adapter: the adapter.
        path: the folder.
        component: the part of the pipeline that it belongs to; None tells it from the class of its model.

    Raises:
        SpectuneError: the component is not known, or the file cannot hold a part of the adapter.
    """
    component = component or _component_of(adapter)
    if component not in COMPONENTS:
        raise SpectuneError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}")
    whole = [*adapter.modules, *(n for n, layer in adapter.layers.items() if layer.terms[0].method.replaces)]
    if whole:
        raise SpectuneError(
            f"{whole[0]!r} was trained whole, and diffusers' file of LoRAs has no place for it: save the adapter with "
            "adapter.save(path), or the merged component with its own save_pretrained"
        )
    config, tensors, _ = peft_contents(to_scale_one(adapter))
    named = {f"{component}.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    told = json.dumps({f"{component}.{key}": config[key] for key in _SAID}, indent=2, sort_keys=True)
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / FILE, lambda file: save_tensors(named, file, {"format": "pt", _METADATA: told}))
    return path


def _component_of(adapter: Contents) -> str:
    kind = "" if adapter.architecture is None else adapter.architecture[0]
    for part, component in _BY_CLASS.items():
        if part in kind:
            return component
    raise SpectuneError(
        f"which part of a pipeline the adapter belongs to is not known from its model's class {kind!r}: give component "
        f"(--component), one of {', '.join(COMPONENTS)}"
    )

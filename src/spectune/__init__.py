"""Fine-tune transformer models through the singular values and vectors of their own weights.

    model, tokenizer = spectune.load_base("smollm2-135m")
    spectune.adapt(model, spectune.SVF())
    ...  # train with any loop
    spectune.extract(model).save("pirate")

Names are imported when first used, so that `import spectune` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectune import spectral
    from spectune.adapters.adapter import Adapter
    from spectune.bases.classifiers import classify
    from spectune.bases.loading import load_base
    from spectune.errors import SpectuneError
    from spectune.methods import Method
    from spectune.methods.adalora import AdaLoRA
    from spectune.methods.dora import DoRA
    from spectune.methods.head import Head
    from spectune.methods.lora import LoRA
    from spectune.methods.lora_xs import LoRAXS
    from spectune.methods.milora import MiLoRA
    from spectune.methods.pissa import PiSSA
    from spectune.methods.svf import SVF
    from spectune.methods.svft import SVFT
    from spectune.model.adapting import adapt, attach, trainable
    from spectune.model.fusing import fused
    from spectune.model.lifecycle import detach, extract
    from spectune.model.merging import merge, unmerge
    from spectune.model.names import adapter_names
    from spectune.model.routing import Reference, activate, base_alone, route
    from spectune.planning.plan import plan
    from spectune.speed.recompute_cache import keep_products
    from spectune.training.trainer.checkpoints import Trainer, trainer_for
    from spectune.transformer2.few_shot import FewShot
    from spectune.transformer2.library import Library
    from spectune.transformer2.two_pass import Transformer2

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapters.adapter",
    "Head": "methods.head",
    "FewShot": "transformer2.few_shot",
    "Library": "transformer2.library",
    "Trainer": "training.trainer.checkpoints",
    "Transformer2": "transformer2.two_pass",
    "Method": "methods",
    "Reference": "model",
    "SpectuneError": "errors",
    "classify": "bases.classifiers",
    "keep_products": "speed.recompute_cache",
    "load_base": "bases.loading",
    "plan": "planning.plan",
    "trainer_for": "training.trainer.checkpoints",
    **dict.fromkeys(
        (
            "Reference",
            "activate",
            "adapt",
            "adapter_names",
            "attach",
            "base_alone",
            "detach",
            "extract",
            "fused",
            "merge",
            "route",
            "trainable",
            "unmerge",
        ),
        "model",
    ),
}

__all__ = [
    "SVF",
    "SVFT",
    "AdaLoRA",
    "Adapter",
    "DoRA",
    "FewShot",
    "Head",
    "Library",
    "LoRA",
    "LoRAXS",
    "Method",
    "MiLoRA",
    "PiSSA",
    "Reference",
    "SpectuneError",
    "Trainer",
    "Transformer2",
    "activate",
    "adapt",
    "adapter_names",
    "attach",
    "base_alone",
    "classify",
    "detach",
    "extract",
    "fused",
    "keep_products",
    "load_base",
    "merge",
    "plan",
    "route",
    "spectral",
    "trainable",
    "trainer_for",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name == "spectral":
        return import_module("spectune.spectral")
    if name in _HOMES:
        return getattr(import_module(f"spectune.{_HOMES[name]}"), name)
    if not name.startswith("_"):  # any registered method, a new file in spectune.methods included
        for cls in import_module("spectune.methods").METHODS.values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'spectune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

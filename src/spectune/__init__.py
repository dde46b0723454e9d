"""Fine-tune transformer models through the singular values and vectors of their own weights.

    model, tokenizer = spectune.load_base("smollm2-135m")
    spectune.adapt(model, spectune.SVF())
    ...  # train with any loop
    spectune.extract(model).save("pirate")
"""

from spectune import spectral
from spectune.adapters.adapter import Adapter
from spectune.bases import load_base
from spectune.errors import SpectuneError
from spectune.methods import METHODS, Method
from spectune.methods.adalora import AdaLoRA
from spectune.methods.dora import DoRA
from spectune.methods.lora import LoRA
from spectune.methods.lora_xs import LoRAXS
from spectune.methods.milora import MiLoRA
from spectune.methods.pissa import PiSSA
from spectune.methods.svf import SVF
from spectune.methods.svft import SVFT
from spectune.model import activate, adapt, adapters, attach, detach, extract, merge, route

__version__ = "0.1.0"


def __getattr__(name: str) -> type[Method]:
    """Return a registered method's class, so that a new file in `spectune.methods` is public at once."""
    for cls in METHODS.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'spectune' has no attribute {name!r}")


__all__ = [
    "SVF",
    "SVFT",
    "AdaLoRA",
    "Adapter",
    "DoRA",
    "LoRA",
    "LoRAXS",
    "Method",
    "MiLoRA",
    "PiSSA",
    "SpectuneError",
    "activate",
    "adapt",
    "adapters",
    "attach",
    "detach",
    "extract",
    "load_base",
    "merge",
    "route",
    "spectral",
]

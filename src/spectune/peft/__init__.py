"""Spectune's methods as `peft_config`s: imported once, they are known to PEFT, transformers and TRL.

    import spectune.peft
    from peft import get_peft_model

    model = get_peft_model(model, spectune.peft.SVFConfig())

What `save_pretrained` writes opens in `spectune.Adapter.load`, and what `Adapter.save` writes in
`PeftModel.from_pretrained`.
"""

from __future__ import annotations

from spectune.errors import need

need("peft", "spectune.peft", "spectune[peft]")

from spectune.peft.config import (  # noqa: E402
    LoRAXSConfig,
    MiLoRAConfig,
    PiSSAConfig,
    SpectuneConfig,
    SVFConfig,
    SVFTConfig,
)
from spectune.peft.register import config_of, register_all  # noqa: E402

register_all()
AdaLoRAConfig = config_of("adalora")
VeRAConfig = config_of("vera")

__all__ = [
    "AdaLoRAConfig",
    "LoRAXSConfig",
    "MiLoRAConfig",
    "PiSSAConfig",
    "SVFConfig",
    "SVFTConfig",
    "SpectuneConfig",
    "VeRAConfig",
    "config_of",
]

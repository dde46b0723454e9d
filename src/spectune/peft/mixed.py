"""`PeftMixedModel` with our methods among PEFT's: its lists of methods are closed, and are extended here."""

from __future__ import annotations

from typing import Any, cast

import peft.mixed_model as mixed_model
import torch.nn as nn
from peft.tuners import mixed
from peft.tuners.mixed import model as lists
from peft.tuners.tuners_utils import BaseTuner

from spectune.layers.modules import OF_ADAPTERS
from spectune.peft.config import SpectuneConfig
from spectune.peft.layer import PeftLayer
from spectune.peft.tuner import SpectuneTuner, untie_merged

_tuners: dict[type, type[SpectuneTuner]] = {}


class Mixed(mixed.MixedModel):
    """PEFT's model of several methods, in which ours adapt their layers as they do alone."""

    def _check_new_adapter_config(self, config: Any) -> None:
        if isinstance(config, SpectuneConfig):
            BaseTuner._check_new_adapter_config(self, config)
        else:
            super()._check_new_adapter_config(config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> object:
        tuner = _tuners.get(type(peft_config))
        if tuner is None:
            return mixed.MixedModel._prepare_adapter_config(peft_config, model_config)
        return tuner.prepared(self.model, peft_config, model_config)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        tuner = _tuners.get(type(config))
        if tuner is None:
            super()._create_and_replace(config, *args, **kwargs)
        else:
            tuner.put(self, config, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        tuner = _tuners.get(type(self.peft_config[adapter_name]))
        if tuner is not None:
            tuner.fill(model, adapter_name, cast(SpectuneConfig, self.peft_config[adapter_name]))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> object:
        ours = [module for module in self.model.modules() if isinstance(module, PeftLayer)]
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in ours:
            layer.leave()
        untie_merged(self.model)
        return unloaded


def let_mix(config: type[SpectuneConfig], tuner: type[SpectuneTuner], peft_type: object) -> None:
    """Put a method on PEFT's lists of those that may be mixed."""
    _tuners[config] = tuner
    mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, peft_type)
    for prefix in (tuner.prefix, *(f"base_layer.{part}" for part in OF_ADAPTERS)):  # what deleting goes past
        if prefix not in lists.PREFIXES:
            lists.PREFIXES.append(prefix)
    lists.Layers = (*lists.Layers, tuner.tuner_layer_cls)
    mixed_model.MixedModel = Mixed

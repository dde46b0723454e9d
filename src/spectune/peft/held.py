"""What PEFT holds for an adapted layer: its trained tensors, and what tells its base and its updates again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn as nn
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from spectune.adapters import fingerprint
from spectune.layers.updates import Update
from spectune.methods import Method

BASE, SKETCH = "base", "sketch"  # of W, and of the update: saved beside what was trained


class HeldUpdate(Update):
    """An update whose trained tensors lie where PEFT looks for them: a ParameterDict for each, with a key an adapter.

    Args:
        method: what to do with the tensors.
        names: of the tensors.
        holder: the layer that has the ParameterDicts.
        adapter: the key.
    """

    def __init__(self, method: Method, names: Iterable[str], holder: object, adapter: str) -> None:
        super().__init__(method, {})
        self.names = tuple(names)
        self.adapter = adapter
        vars(self)["holder"] = holder  # not a submodule of its own child

    def places(self) -> dict[str, tuple[dict[str, nn.Parameter | None], str]]:
        """Return for each trained tensor the mapping that holds it, and its key there."""
        holder = vars(self)["holder"]
        return {name: (holder._modules[f"{holder.prefix}{name}"]._parameters, self.adapter) for name in self.names}

    def tensor(self, name: str) -> Tensor:
        """Return one of the trained tensors."""
        holder = vars(self)["holder"]
        held = holder._modules[f"{holder.prefix}{name}"]
        own = held._parameters
        if self.adapter not in own:  # a replica's, or one that FSDP shards
            return getattr(held, self.adapter)
        return own[self.adapter]  # which ZeRO-3 brings together as it is asked for, and not by `get`

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""
        return {name: self.tensor(name) for name in self.names}

    # what a schedule keeps beside the trained tensors, as AdaLoRA's scores, lies in the holder too: PEFT saves it there

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Hold a tensor of a schedule, by the adapter's name, in a dictionary of the holder."""
        assert tensor is not None
        holder = vars(self)["holder"]
        attribute = f"{holder.prefix}{name}"
        if attribute not in holder._modules:
            holder.add_module(attribute, Scores({}, persistent=persistent))
            holder.other_param_names = (*holder.other_param_names, attribute)
        holder._modules[attribute][self.adapter] = tensor

    def _scores(self, name: str) -> Scores | None:
        holder = vars(self).get("holder")
        held = None if holder is None else holder._modules.get(f"{holder.prefix}{name}")
        return held if isinstance(held, Scores) and self.adapter in held else None

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("names", ()):
            return self.tensor(name)
        scores = self._scores(name)
        return super().__getattr__(name) if scores is None else scores[self.adapter]

    def __setattr__(self, name: str, value: object) -> None:
        scores = self._scores(name) if isinstance(value, Tensor) else None
        if scores is None:
            super().__setattr__(name, value)
        else:
            scores[self.adapter] = value


class Scores(BufferDict):
    """A tensor that a schedule keeps for each adapter, which stays as it is where a folder has none."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        held = cast("list[tuple[str, Tensor]]", list(self.items()))
        for adapter, own in held:
            if f"{prefix}{adapter}" not in state_dict:
                state_dict[f"{prefix}{adapter}"] = torch.zeros_like(own, device="cpu") if own.is_meta else own
        super()._load_from_state_dict(state_dict, prefix, *args)


class Sketches(BufferDict):
    """What tells the base, or the updates, again: made when it is saved, and zero here but for what was loaded.

    Args:
        layer: whose.
        kind: BASE or SKETCH.
    """

    def __init__(self, layer: object, kind: str) -> None:
        super().__init__({}, persistent=True)
        self.kind = kind
        vars(self)["layer"] = layer  # not a submodule of its own child

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        copied = vars(self).get("_is_replica", False)  # as nn.DataParallel does at every call
        if isinstance(value, Tensor) and name in self and not copied:  # transformers fills in what it loads
            vars(self)["layer"].unseen.add(name)

    def add(self, adapter: str) -> None:
        """Have a place for an adapter's."""
        self[adapter] = torch.zeros(fingerprint.WEIGHT_SHAPE if self.kind == BASE else fingerprint.UPDATE_SHAPE)

    def pop_told(self, adapter: str) -> Tensor | None:
        """Return what was loaded, and forget it; None where nothing was."""
        told = self._buffers.get(adapter)
        if told is None or not told.any():
            return None
        self.add(adapter)
        return told.cpu()

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        vars(self)["layer"].check()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter in self:
            made = vars(self)["layer"].sketch(adapter, self.kind)
            if made is not None:
                destination[f"{prefix}{adapter}"] = made

"""What merging took the place of: a record on each module that it changed, which `unmerge` checks and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted
from spectune.layers.modules import effective_weight
from spectune.layers.packed import is_packed
from spectune.layers.parts import Owner, PartLinear
from spectune.layers.selection import Selection
from spectune.layers.shards import whole
from spectune.layers.taking import take_over
from spectune.layers.whole import Whole, take_over_whole
from spectune.model.fresh import FRESH

RECORD = "spectune_merged"  # an attribute of what merging changed

Sums = tuple[torch.dtype, list[tuple[float, float]]]


class Placed:
    """The tensors that were put in the place of others, over a whole model: what was tied and stays equal is one again.

    Old tensors go by their identity: all of them live when the first is replaced, so that none has another's, though
    `keep=False` lets each go when its turn has come.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._instead: dict[int, nn.Parameter] = {}

    def put_weight(self, old: Tensor, new: nn.Parameter) -> None:
        """Note a layer's new weight, which stands in its place already."""
        self._instead[id(old)] = new
        self.tensors.append(new)

    def put(self, module: nn.Module, key: str, tensor: Tensor) -> tuple[Tensor | None, Tensor]:
        """Put values in the place of a module's tensor, and return what was there and what is."""
        if key in module._buffers:
            old = module._buffers[key]
            module._buffers[key] = made = tensor.clone()
        else:
            old = module._parameters.get(key)
            module._parameters[key] = made = self._parameter(old, tensor)
        self.tensors.append(made)
        return old, made

    def _parameter(self, old: Tensor | None, tensor: Tensor) -> nn.Parameter:
        made = self._instead.get(id(old))
        if made is None or made.shape != tensor.shape or not torch.equal(made, tensor):
            made = nn.Parameter(tensor.clone(), requires_grad=old is not None and old.requires_grad)
            self._instead.setdefault(id(old), made)
        return made


@dataclass
class Held:
    """What detaching takes from an adapted layer."""

    adapters: nn.ModuleDict
    bases: nn.ModuleDict
    selection: Selection
    mixture: Any

    @classmethod
    def by(cls, layer: Adapted) -> Held:
        """Return what a layer holds, in mappings that stay when it is emptied."""
        adapters, bases = nn.ModuleDict(dict(layer.adapters.items())), nn.ModuleDict(dict(layer.bases.items()))
        return cls(adapters, bases, layer.selection, layer.selection.mixture)

    def take_back(self, layer: nn.Module, name: str) -> None:
        """Make a layer the adapted one that it was."""
        adapted, device = take_over(layer, name, self.selection), effective_weight(layer).device
        adapted.adapters, adapted.bases = self.adapters.to(device), self.bases.to(device)
        if adapted.selection.mixture != self.mixture:
            adapted.selection.mixture = self.mixture


@dataclass
class MergedLayer:
    """What a layer was before: its parameters, what it held as an adapted one, and the parameters that it has now."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    held: Held
    fresh: object
    merged: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None)
    sums: Sums | None = None

    def seal(self, layer: Any) -> None:
        """Note what the layer has now, by which a change that is made later is known."""
        self.merged, self.sums = (layer.weight, layer._parameters.get("bias")), _sums(layer)

    def check(self, layer: Any) -> None:
        """Raise a SpectuneError where the layer is no longer as merging left it."""
        if isinstance(layer, Adapted):
            raise SpectuneError(f"{self.name!r} was adapted again after merging: detach the newer adapters first")
        weight, bias = self.merged
        if layer.weight is not weight or layer._parameters.get("bias") is not bias or _differ(layer, self.sums):
            raise SpectuneError(
                f"the merged weight of {self.name!r} is another one now: load the base and attach the adapter instead"
            )

    def give_back(self, layer: Any) -> None:
        """Give a layer back what it was."""
        now = layer.weight
        for key, old in (("weight", self.weight), ("bias", self.bias)):
            if old is not None:
                old.data = old.data.to(now.device)  # the model may have moved since
            if key in layer._parameters:
                setattr(layer, key, old)
        if self.fresh is not None:
            setattr(layer, FRESH, self.fresh)
        self.held.take_back(layer, self.name)


@dataclass
class MergedModule:
    """What a module that an adapter brought whole was before: its tensors, and its adapters with their selection."""

    name: str
    before: dict[str, Any]
    now: dict[str, Tensor]
    adapters: nn.ModuleDict
    selection: Selection
    fresh: object

    def check(self, module: nn.Module) -> None:
        """Raise a SpectuneError where the module is no longer as merging left it."""
        there = {**module._parameters, **module._buffers}
        if isinstance(module, Whole) or any(there[key] is not tensor for key, tensor in self.now.items()):
            raise SpectuneError(f"{self.name!r} is another module now: load the base and attach the adapter instead")

    def give_back(self, module: nn.Module) -> None:
        """Give a module back what it was."""
        for key, tensor in self.before.items():
            place: dict[str, Any] = module._buffers if key in module._buffers else module._parameters
            tensor.data = tensor.data.to(place[key].device)
            place[key] = tensor
        if self.fresh is not None:
            setattr(module, FRESH, self.fresh)
        take_over_whole(module, self.name, self.selection).adapters = self.adapters


@dataclass
class MergedOwner:
    """What the owner of parts was before: its tensors, and its adapted layers with what they held, by their names."""

    before: dict[str, Any]
    now: dict[str, Tensor]
    parts: dict[str, tuple[PartLinear, Held]]

    def check(self, module: nn.Module) -> None:
        """Raise a SpectuneError where the owner is no longer as merging left it."""
        if isinstance(module, Owner) or any(module._parameters[k] is not tensor for k, tensor in self.now.items()):
            raise SpectuneError(
                f"the tensor that {next(iter(self.parts))!r} is a part of is another one now: load the base and "
                "attach the adapter instead"
            )

    def give_back(self, module: nn.Module) -> None:
        """Give an owner back what it was, and its parts."""
        for key, tensor in self.before.items():
            tensor.data = tensor.data.to(self.now[key].device)
            module._parameters[key] = tensor
        for name, (layer, held) in self.parts.items():
            held.take_back(layer, name)


R = TypeVar("R", bound=MergedLayer | MergedModule | MergedOwner)


def records_of(model: nn.Module, kind: type[R]) -> list[tuple[nn.Module, R]]:
    """Return the modules of a model that hold a record of a kind, with it."""
    return [(m, record) for m in model.modules() if isinstance(record := vars(m).get(RECORD), kind)]


def _sums(layer: Any) -> Sums | None:
    """Return what tells whether a layer's parameters are as they were: their sums and sums of sizes.

    Of a packed weight nothing does, whose library lays it out anew as it likes, and which nobody writes to.
    """
    if is_packed(layer):
        return None
    held = [p.detach() for p in (layer.weight, layer._parameters.get("bias")) if p is not None and not p.is_meta]
    sums = [(p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64)) for p in held]
    return layer.weight.dtype, [(float(whole(a)), float(whole(b))) for a, b in sums]


def _differ(layer: object, before: Sums | None) -> bool:
    now = _sums(layer)
    if now is None or before is None:
        return False
    dtype, sums = now
    # not to the last bit: on another device the same values add up in another order
    near = all(
        abs(a - b) <= 1e-10 * size and abs(s - size) <= 1e-10 * size
        for (a, s), (b, size) in zip(sums, before[1], strict=True)
    )
    return dtype != before[0] or not near

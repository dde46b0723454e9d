"""Merging as PEFT does it: W' in the place of W, layer by layer, and W back, whatever others wrote in between."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn as nn
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted
from spectune.layers.experts import ExpertLinear
from spectune.layers.merged import merged_bias, merged_weight
from spectune.layers.modules import effective_weight
from spectune.layers.packed import Packed
from spectune.layers.parts import tensor_of
from spectune.layers.updates import digest
from spectune.peft.held import HeldUpdate


class Kept(NamedTuple):
    """W and b of a merged layer, the parameters that they are, and what tells W' and b' again in their places."""

    weight: Tensor
    bias: Tensor | None
    parameters: dict[str, nn.Parameter]  # which other layers may be tied to; empty of an expert
    merged: tuple[Tensor, Tensor | None] | None  # None of an expert, whose weight is a part of a tensor
    seen: tuple[Tensor, ...]


class Merging(BaseTunerLayer):
    """The part of PEFT's tuner layer that merges."""

    own: dict[str, HeldUpdate]
    _kept: Kept | None

    @property
    def adapted(self) -> Adapted:
        """The layer inside."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise where an adapter was loaded that belongs to another base."""
        raise NotImplementedError

    def _answer(self) -> None:
        """Have the layer inside answer with what is active, enabled and not merged here."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W' in the place of W, which is kept.

        Raises:
            ValueError: with `safe_merge`, W' has values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.own]
        if names:
            self._merge(names, safe_merge, keep=True)

    @torch.no_grad()
    def _merge(self, names: Sequence[str], safe_merge: bool, keep: bool) -> None:
        self.check()
        earlier, before = self._kept, self._state()
        if earlier is not None:
            self._restore()
        weight, bias = self._made([*self.merged_adapters, *names])
        if safe_merge and not bool(weight.isfinite().all()):
            if earlier is not None:
                self._put(*before)
            self._kept = earlier
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        own, parameters = self._state(), self._own_parameters()
        self._put(weight, own[1] if bias is None else bias)
        if keep:
            merged = None if isinstance(self.adapted, ExpertLinear) else self._state()
            self._kept = Kept(*own, parameters, merged, self._seen())
        self.merged_adapters.extend(names)
        self._answer()

    def _made(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return W' of adapters, as the layer holds W, and b' where they have one.

        Raises:
            SpectuneError: W' is no sum of W and an update, and W holds a merged adapter of another tuner.
        """
        layer, chosen = self.adapted, [(name, 1.0) for name in names]
        for name in names:
            norms = layer.tensors(self.own[name]).get("norms")
            if norms is None or isinstance(effective_weight(layer), Packed):
                continue
            now = torch.linalg.vector_norm(effective_weight(layer), dim=1, dtype=norms.dtype)
            if not torch.allclose(now, norms, rtol=1e-3):
                raise SpectuneError(
                    f"DoRA's adapter {name!r} was made for the weight of {layer.adapted_as!r} without what is merged "
                    "into it now: merge this adapter first"
                )
        return merged_weight(layer.adapted_as, layer, chosen), merged_bias(layer, chosen)

    def unmerge(self) -> None:
        """Put W back: bit for bit, unless others wrote to W' in between, as a tuner around this layer does.

        What they wrote stays then, and W' - W is subtracted.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters.clear()
        self._answer()

    @torch.no_grad()
    def _restore(self) -> None:
        """Take the merged adapters out of the layer's weight and bias."""
        assert self._kept is not None
        kept, (weight, bias) = self._kept, self._state()
        untouched = self._is_untouched(kept)
        self._put(kept.weight, kept.bias)
        for key, own in kept.parameters.items():
            own.data = self.adapted._parameters[key].data  # type: ignore[union-attr]
            self.adapted._parameters[key] = own
        # a tuner around this layer wrote to W' meanwhile: what it added stays, and what merging added is taken away
        if not untouched:
            made, made_bias = self._made(self.merged_adapters)
            weight = weight - made.to(weight) + kept.weight.to(weight)
            if bias is not None and made_bias is not None:
                bias = bias - made_bias.to(bias) + kept.bias.to(bias)  # type: ignore[union-attr]
            self._put(weight, bias)
        self._kept = None

    def _is_untouched(self, kept: Kept) -> bool:
        """Whether W' and b' are what merging made, in another dtype or on another device it may be."""
        now = self._state()
        if kept.merged is not None and now[0].data_ptr() != kept.merged[0].data_ptr():
            pairs = [(a, b) for a, b in zip(now, kept.merged, strict=True) if a is not None and b is not None]
            return all(torch.equal(a, b.to(a)) for a, b in pairs)
        return all(torch.equal(a, b.to(a)) for a, b in zip(self._seen(), kept.seen, strict=True))

    def _seen(self) -> tuple[Tensor, ...]:
        return tuple(digest(tensor) for tensor in self._state() if tensor is not None)

    def _state(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight, as the layer holds it, and the bias; an expert's weight as a copy, since it is a part."""
        layer = self.adapted
        if isinstance(layer, ExpertLinear):
            return layer.lender()(tensor_of(layer.owner, layer.key)).clone(), None
        bias = layer._parameters.get("bias")
        return cast(Tensor, layer._parameters["weight"]).data, None if bias is None else bias.data

    def _put(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put another weight and bias, as `_state` returns them, into the layer."""
        layer = self.adapted
        if isinstance(layer, ExpertLinear):
            layer.put(tensor_of(layer.owner, layer.key).detach(), weight)
            return
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        for key, value in values.items():  # another parameter, since layers that are tied to this one keep theirs
            held = cast(nn.Parameter, layer._parameters[key])
            made = nn.Parameter(value.to(held.device, held.dtype), requires_grad=held.requires_grad)
            layer._parameters[key] = made

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        layer = self.adapted
        held = {} if isinstance(layer, ExpertLinear) else layer._parameters
        return {key: p for key, p in held.items() if key in ("weight", "bias") and p is not None}

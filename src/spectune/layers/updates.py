"""Updates of one layer: a method with its trained tensors, and the frozen tensors that methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.factors import Base, Factors, Ratio
from spectune.layers.values import Made, digest

_numbers = count(1)
Tensors = Mapping[str, Tensor]


class Rule(Protocol):
    """A method as the adapted layer sees it: `spectune.methods.Method` says what each of these is."""

    additive: ClassVar[bool]
    replaces: ClassVar[bool]
    in_factors: ClassVar[bool]
    core_only: ClassVar[bool]

    @property
    def drop(self) -> float: ...
    @property
    def basis_key(self) -> str: ...
    def factors(self, t: Tensors) -> Factors: ...
    def whole(self, t: Tensors) -> Factors | None: ...
    def ratio(self, t: Tensors, base: Base) -> Ratio | None: ...
    def ratios(self, ts: Sequence[Tensors], bases: Sequence[Base]) -> Tensor | None: ...
    def still(self, t: Tensors) -> Tensors: ...
    def respond(self, t: Tensors, x: Tensor, base: Base, training: bool) -> Tensor: ...
    def add(self, t: Tensors, x: Tensor, y: Tensor) -> None: ...
    def delta(self, t: Tensors, weight: Tensor) -> Tensor: ...
    def bias_of(self, t: Tensors, own: Tensor | None) -> Tensor | None: ...
    def replacement(self, t: Tensors, x: Tensor, bias: Tensor | None) -> Tensor: ...


class _Resident(nn.Module):
    """Stays where layers compute: accelerate, which brings parameters when a module is called, never sees it called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":
            value.detach_hook(self)
            device = getattr(value, "execution_device", None)
            if device is not None and torch.zeros(0, device=device).device.type != "meta":
                self.to(device)
        elif name not in ("_old_forward", "forward"):
            super().__setattr__(name, value)


class Basis(_Resident):
    """The frozen tensors of a method on one weight, shared by every adapter that has the same basis."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        self.made: Made | None = None  # W as it was when they were made of it, as far as that is known
        self.compared: tuple[Tensor, bool] | None = None  # the digest of a W, and whether it is that one
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def check_kept(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise where a function throws values away, as that of `to_empty` does: no state has the frozen tensors."""
        held = next((t for t in self.tensors().values() if t.is_floating_point() and not t.is_meta), None)
        if held is None:
            return
        # other numbers at each call: memory that is handed out again may hold those of a call before, and fresh memory
        # zeros
        more, number = divmod(next(_numbers), 100)
        known = held.new_tensor([1 + number, 1 + more % 100])  # which 8 bits tell apart as well
        moved = fn(known)
        if not moved.is_meta and not torch.equal(moved.cpu().float(), known.cpu().float()):
            raise SpectuneError(
                "this would throw away the frozen tensors of the adapters on the model, which no state has, as "
                "to_empty() does: detach the adapters before, and attach them when the weights are loaded"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        # either of the two: matrices are parameters where FSDP2 has sharded them
        held = {**self._buffers, **self._parameters}
        return held if len(held) == len(self.names) else {n: getattr(self, n) for n in self.names}

    def as_parameters(self) -> None:
        """Hold the matrices as frozen parameters, which FSDP2 shards, and not as buffers, which it does not."""
        for name, tensor in list(self._buffers.items()):
            if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class Update(_Resident):
    """One term of one adapter on one layer: a method, its trained tensors as parameters, and a weight.

    Args:
        method: what to do with the tensors.
        trained: the tensors that train.
        weight: factor of the whole update; 1 except in a sum of adapters.
    """

    def __init__(self, method: Rule, trained: Mapping[str, Tensor], weight: float = 1.0) -> None:
        super().__init__()
        self.method, self.weight = method, weight
        self.drops = method.drop > 0
        self._kept: tuple[list[Tensor], Ratio | None] | None = None
        self.basis_key = method.basis_key
        self.unmade = self.needs_basis = False  # put on a weight without values; of which the method needs some
        self.scale: float | None = None  # s, once it was asked for
        self.begun = False  # what the method does by itself as training proceeds
        self.names = tuple(trained)
        for name, tensor in trained.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors by name; those of a replica of nn.DataParallel are plain attributes."""
        own = cast("dict[str, Tensor]", dict(self._parameters))  # none of which is None
        return own or {name: getattr(self, name) for name in self.names}

    def tensor(self, name: str) -> Tensor:
        """Return one of the trained tensors."""
        return cast(Tensor, self._parameters[name])  # none of which is None

    def places(self) -> dict[str, tuple[dict[str, nn.Parameter | None], str]]:
        """Return for each trained tensor the mapping that holds it, and its key there."""
        return {name: (self._parameters, name) for name in self._parameters}

    def ratio(self, tensors: dict[str, Tensor], base: Base) -> Ratio | None:
        """Return the method's ratio; without gradients it is kept as long as W and the trained tensors are the same."""
        if self.method.additive:
            return None
        of_weight = None if torch.is_grad_enabled() else base.seen()
        if of_weight is None:
            # with gradients the ratio is a part of the graph, and of this pass alone
            self._kept = None
            return self.method.ratio(tensors, base)
        seen = [*of_weight, *(digest(p) for p in self.trained().values())]
        kept = self._kept
        if kept is None or not all(a is b or torch.equal(a, b) for a, b in zip(seen, kept[0], strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                seen = [*of_weight, *(d.clone() for d in seen[len(of_weight) :])]  # nobody writes to those of W
                self._kept = kept = seen, self.method.ratio(tensors, base)
        return kept[1]

    def extra_repr(self) -> str:
        return repr(self.method)


def updates_in(adapters: nn.ModuleDict, name: str) -> Iterable[Update]:
    """Return what a layer holds of an adapter; nn.ModuleDict does not say what its modules are."""
    return cast("Iterable[Update]", adapters[name])

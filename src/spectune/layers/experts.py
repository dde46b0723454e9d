"""Experts whose weights lie side by side in one tensor: each weight is a linear layer as any other.

`ExpertLinear` is the layer, W a part of the module's tensor.  An adapted module of experts runs its own forward method
with stand-ins in the place of its tensors, whose products are those of the layers; the tensors are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.layers.grouped import together
from spectune.layers.parts import Owner, PartLinear, StandIn, be_owner, be_plain, tensor_of

KEYS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")  # as transformers calls them, in the order of use
_GROUPED = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)
_GROUPED_BY_TRANSFORMERS = "grouped_mm_fallback"  # an operator of its own, where PyTorch has none
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__)


class ExpertLinear(PartLinear):
    """The linear layer of one expert.

    Args:
        experts: the module of experts, its owner.
        key: name of its tensor (experts x out x in, or experts x in x out).
        index: of the expert.
    """

    index: int

    def __init__(self, experts: nn.Module, key: str, index: int) -> None:
        rows, columns = tensor_of(experts, key).shape[1:]
        super().__init__(experts, key, (columns, rows) if is_transposed(experts) else (rows, columns))
        vars(self)["index"] = index

    @property
    def is_held_transposed(self) -> bool:
        return is_transposed(self.owner)

    def part(self, held: Tensor) -> Tensor:
        own = held[self.index]
        return own.mT if self.is_held_transposed else own

    def put(self, held: Tensor, weight: Tensor) -> None:
        held[self.index] = weight

    def weight_of_all(self) -> Tensor:
        """Return W of every expert (experts x out x in)."""
        held = tensor_of(self.owner, self.key)
        return held.mT if self.is_held_transposed else held

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(tensor_of(self.owner, self.key))

    @property
    def place(self) -> str:
        return f"{self.index}.{self.key}"

    def lender(self) -> Callable[[Tensor], Tensor]:
        index = self.index
        return lambda tensor: tensor.detach()[index]

    def join(self) -> None:
        experts, number = self.owner, str(self.index)
        be_owner(experts, experts_class)
        holder = experts._modules.get(number)
        if holder is None:
            holder = experts._modules[number] = Expert()
        holder._modules[self.key] = self

    def leave(self) -> None:
        experts, number = self.owner, str(self.index)
        holder: Any = experts._modules[number]
        del holder._modules[self.key]
        if not holder._modules:
            del experts._modules[number]
        be_plain(experts, experts_class)


def keys_of(module: nn.Module) -> list[str]:
    """Return the names of a module's tensors that hold a matrix for each of several experts, in a known layout."""
    keys = [key for key in KEYS if (p := module._parameters.get(key)) is not None and p.dim() == 3]
    known = len(keys) > 1 and "down_proj" in keys
    return keys if known and _transposed(module, keys) is not None else []


def is_transposed(experts: nn.Module) -> bool:
    """Whether each W is held (in x out)."""
    return bool(_transposed(experts, [key for key in KEYS if key in experts._parameters or key in vars(experts)]))


def _transposed(module: nn.Module, keys: Sequence[str]) -> bool | None:
    """Return whether W is held (in x out): as transformers says, or as shapes do; None where neither does."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    into, out = tensor_of(module, keys[0]), tensor_of(module, "down_proj")
    if keys[0] != "gate_up_proj":
        return None
    if into.shape[1] == 2 * out.shape[2] and into.shape[2] == out.shape[1]:
        return False
    return True if into.shape[2] == 2 * out.shape[1] and into.shape[1] == out.shape[2] else None


def expert_layers(module: nn.Module) -> Iterator[tuple[str, ExpertLinear]]:
    """Yield the layers of a module of experts, by name in it; nothing if it is none.

    Those that are adapted are there; the others are made when they are asked for.
    """
    keys = keys_of(module)
    for index in range(len(tensor_of(module, keys[0])) if keys else 0):
        for key in keys:
            yield f"{index}.{key}", expert_layer(module, key, index)


def expert_layer(experts: nn.Module, key: str, index: int) -> ExpertLinear:
    """Return the layer of one expert."""
    there = called_for(experts, key, index)
    return ExpertLinear(experts, key, index) if there is None else _inside(there)


def called_for(experts: nn.Module, key: str, index: int) -> nn.Module | None:
    """Return what answers for the adapted layer of one expert: the layer, or PEFT's around it; None for the others."""
    holder = experts._modules.get(str(index))
    return None if holder is None else holder._modules.get(key)


def _inside(layer: Any) -> ExpertLinear:
    while not isinstance(layer, ExpertLinear):
        layer = layer.base_layer
    return layer


def find_expert(model: nn.Module, name: str) -> ExpertLinear | None:
    """Return the layer of one expert by its name in a model, or None if there is none."""
    owner, _, key = name.rpartition(".")
    owner, _, number = owner.rpartition(".")
    try:
        experts = model.get_submodule(owner)
    except AttributeError:
        return None
    if key not in keys_of(experts) or not number.isdecimal() or int(number) >= len(tensor_of(experts, key)):
        return None
    return expert_layer(experts, key, int(number))


class Experts(Owner):
    """Mixed into the class of a module of experts some of whose layers are adapted."""

    def adapted_parts(self) -> Iterator[tuple[str, Any]]:
        for number, holder in self._modules.items():
            if number.isdecimal() and isinstance(holder, Expert):
                yield from ((f"{number}.{key}", _inside(layer)) for key, layer in holder._modules.items())

    @torch.compiler.disable
    def forward(self, *args: object, **kwargs: object) -> object:
        if not self.asked():
            return super().forward(*args, **kwargs)
        kind = self.plain_class
        # a copy without its own tensors, and not a change of this module: threads that answer at once share the
        # module, and what stands in for its tensors is of one call
        copy = object.__new__(kind)
        keys = {layer.key for _, layer in self.adapted_parts()}
        state = dict(vars(self))
        state["_parameters"] = {k: p for k, p in self._parameters.items() if k not in keys}
        # of the ways that transformers has, this one sorts tokens by expert, which is what layers with rows of their
        # own can answer
        if getattr(state.get("config"), "_experts_implementation", None) not in (None, "eager"):
            state["config"] = _Grouped(state["config"])
        vars(copy).update(state, **{key: ExpertsStandIn(self, key) for key in keys})
        return kind.forward(copy, *args, **kwargs)


class _Grouped:
    """A configuration by which transformers takes experts' products from tokens that it has sorted by expert."""

    _experts_implementation = "grouped_mm"

    def __init__(self, config: object) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class Expert(nn.Module):
    """Holds the adapted layers of one expert, so that they have names and their tensors an owner."""


@cache
def experts_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules whose experts are adapted: a subclass, so that isinstance goes on holding."""
    members = {"__module__": kind.__module__, "plain_class": kind, "made_by": (experts_class, kind)}
    return type(f"Adapted{kind.__name__}", (Experts, kind), members)


class ExpertsStandIn(StandIn):
    """What stands in the place of a tensor of experts.

    Args:
        experts: the module.
        key: name of the tensor.
        index: of the expert that is meant; None for all.
        flipped: the last two axes are the other way round than the module holds them.
    """

    def __init__(self, experts: nn.Module, key: str, index: int | None = None, flipped: bool = False) -> None:
        super().__init__(experts, key)
        self._index, self._flipped = index, flipped

    @property
    def _held(self) -> Tensor:
        held = tensor_of(self._owner, self._key)
        held = held if self._index is None else held[self._index]
        return held.mT if self._flipped else held

    @property
    def _remedy(self) -> str:
        return f"the experts out with exclude=[{self._key!r}]"

    def __getitem__(self, index: object) -> Any:
        number = index.item() if isinstance(index, Tensor) and index.numel() == 1 and not index.dim() else index
        if self._index is not None or not isinstance(number, int) or isinstance(number, bool):
            return super().__getitem__(index)
        # raises IndexError as a tensor does, by which a loop over it ends
        number = range(self.shape[0])[number]  # which may count from the end
        return ExpertsStandIn(self._owner, self._key, number, self._flipped)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._made() if self._index is not None else [self[i] for i in range(self.shape[0])])

    def unbind(self, dim: int = 0) -> Sequence[object]:
        """Return each expert's."""
        return tuple(self) if dim == 0 and self._index is None else self._made().unbind(dim)

    def transpose(self, first: int, second: int) -> object:
        """Return W'^T of each expert."""
        axes = {axis % (3 if self._index is None else 2) for axis in (first, second)}
        if axes != ({1, 2} if self._index is None else {0, 1}):
            return self._made().transpose(first, second)
        return self.mT

    swapaxes = swapdims = transpose

    @property
    def mT(self) -> ExpertsStandIn:
        """W'^T of each expert."""
        return ExpertsStandIn(self._owner, self._key, self._index, not self._flipped)

    @property
    def T(self) -> object:
        """W'^T."""
        return self._made().T if self._index is None else self.mT

    def t(self) -> Any:
        """Return W'^T."""
        return self._made().t() if self._index is None else self.mT

    def _made(self, dtype: torch.dtype | None = None) -> Tensor:
        held = tensor_of(self._owner, self._key)
        found = []
        for i in range(len(held)) if self._index is None else (self._index,):
            layer = called_for(self._owner, self._key, i)
            if layer is not None and not isinstance(layer, ExpertLinear):
                raise self._refused("which PEFT's layer around it has no answer to")
            own = held[i].to(dtype or held.dtype) if layer is None else self._layers_own(layer, dtype)
            found.append(own if layer is None or not layer.is_held_transposed else own.mT)
        made = found[0] if self._index is not None else torch.stack(found)
        return made.mT if self._flipped else made

    @property
    def _out_first(self) -> bool:
        """Whether each matrix is (out x in) as it stands."""
        return is_transposed(self._owner) == self._flipped

    def _product(self, func: Any, x: Any = None, weight: Any = None, *more: Any, **named: Any) -> Tensor | None:
        if weight is not self or not isinstance(x, Tensor):
            return None
        if func is F.linear and self._index is not None and self._out_first:
            bias = more[0] if more else named.get("bias")
            y = self._layer(self._index)(x)
            return y if bias is None else y + bias
        if self._out_first:
            return None
        if func in _PRODUCTS and self._index is not None and not more:
            return self._layer(self._index)(x)
        if self._index is None and (func in _GROUPED or getattr(func, "__name__", "") == _GROUPED_BY_TRANSFORMERS):
            return self._by_group(x, **named)
        if func in (torch.bmm, torch.Tensor.bmm) or (func in _PRODUCTS and x.dim() == 3):
            return torch.stack([self._layer(i)(part) for i, part in enumerate(x.unbind())])
        return None

    def _by_group(self, x: Tensor, offs: Tensor | None = None, **more: object) -> Tensor | None:
        """Return x W'^T for x (tokens x in), sorted by expert, of which `offs` says where each's tokens end."""
        if offs is None or any(value is not None for value in more.values()):
            return None
        count = len(offs)
        # the meta device has no numbers: a plan is made for tokens that are divided evenly
        ends = [len(x) * (i + 1) // count for i in range(count)] if x.is_meta else offs.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        # experts without a token are not asked: their products would be empty
        places = [i for i, size in enumerate(sizes) if size]
        layers, rest = [self._layer(i) for i in places], len(x) - ends[-1]
        if layers:
            own = x if not rest else x.narrow(0, 0, ends[-1])
            written = getattr(self._owner, "has_bias", True)  # to which transformers adds in place
            if (y := together(layers, own, [sizes[i] for i in places], written)) is not None:
                return torch.cat([y, x.new_zeros(rest, self.shape[-1])]) if rest else y
        *pieces, _ = x.split([*sizes, rest])  # not sliced, whose gradients are each as large as x's
        parts = [layer(pieces[i]) for i, layer in zip(places, layers, strict=True)]
        if rest or not parts:
            parts.append(x.new_zeros(rest, self.shape[-1]))
        return torch.cat(parts)

    def _layer(self, index: int) -> Callable[[Tensor], Tensor]:
        there = called_for(self._owner, self._key, index)
        return expert_layer(self._owner, self._key, index) if there is None else there

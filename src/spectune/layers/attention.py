"""torch's MultiheadAttention, which multiplies by its weights itself: each of its projections is a linear layer.

An adapted module runs its own forward method with stand-ins in the place of its weights, whose products are those of
the layers.  In evaluation mode it, and the encoder layers around it, would otherwise hand all weights to one fused
function.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from spectune.layers.classes import Remade, change_class, without
from spectune.layers.parts import Owner, StandIn, tensor_of
from spectune.layers.projections import KEY, QUERY, VALUE, ProjectionLinear, Rows, places

IN = "in_proj"
_FUSED = "in_proj_weight"
_APART = {QUERY: "q_proj_weight", KEY: "k_proj_weight", VALUE: "v_proj_weight"}
# what has them take their own way, in which they call the modules in them
_SLOWLY: dict[type[nn.Module], dict[str, object]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}


class InProjection(ProjectionLinear):
    """The linear layer of what the queries, the keys or the values go through, or of all of them."""

    def join(self) -> None:
        self.owner._modules[self.name] = self

    def leave(self) -> None:
        del self.owner._modules[self.name]


def in_projections(module: nn.Module, *, split: bool = False) -> dict[str, InProjection]:
    """Return the layers that a module of attention multiplies its inputs by, by name; none of another module.

    Args:
        module: the module.
        split: where the three lie in one tensor, give each a layer of its own.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return {}
    size = module.embed_dim
    if not module._qkv_same_embed_dim:
        whole = Rows(0, size, size)
        return {name: _layer(module, name, whole, key) for name, key in _APART.items()}
    if not split:
        return {IN: _layer(module, IN, Rows(0, 3 * size, 3 * size), _FUSED)}
    return {name: _layer(module, name, Rows(i * size, size, 3 * size), _FUSED) for i, name in enumerate(_APART)}


def find_in_projection(module: nn.Module, name: str) -> InProjection | None:
    """Return the layer of this name in a module of attention, or None."""
    return {**in_projections(module, split=True), **in_projections(module)}.get(name)


def _layer(module: nn.MultiheadAttention, name: str, rows: Rows, key: str) -> InProjection:
    there = module._modules.get(name)
    return there if isinstance(there, InProjection) else InProjection(module, name, rows, key)


class Attention(Owner):
    """Mixed into the class of a module of attention some of whose projections are adapted."""

    def adapted_parts(self) -> Iterator[tuple[str, Any]]:
        yield from ((key, part) for key, part in self._modules.items() if isinstance(part, InProjection))

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> object:
        out: Any = self._modules["out_proj"]
        of_out = _is_adapted(out) and (bool(out._forward_pre_hooks) or out.is_asked())
        if not self.asked() and not of_out:
            return super().forward(*args, **kwargs)
        layers = [part for _, part in self.adapted_parts()]
        keys = {part.key for part in layers}
        stand_ins = {key: WeightStandIn(self, key, [part for part in layers if part.key == key]) for key in keys}
        modules: dict[str, object] = dict(self._modules)
        if of_out:  # whose layer adds its own bias
            modules["out_proj"] = types.SimpleNamespace(weight=WeightStandIn(out, "weight", [out]), bias=None)
        elif hasattr(out, "read"):  # which adapters bring whole
            modules["out_proj"] = out.read()
        kind, copy = self.plain_class, object.__new__(self.plain_class)
        kept = {key: p for key, p in self._parameters.items() if key not in stand_ins}
        vars(copy).update({**vars(self), "_parameters": kept, "_modules": modules}, **stand_ins)
        return kind.forward(copy, *args, **kwargs)


class Slowly(Remade):
    """Mixed into the class of an encoder, or a layer of one, within which something is adapted."""

    plain_class: type[nn.Module]

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> object:
        kind, copy = self.plain_class, object.__new__(self.plain_class)
        more = next(values for of, values in _SLOWLY.items() if issubclass(kind, of))
        vars(copy).update({**vars(self), **more})
        return kind.forward(copy, *args, **kwargs)


@cache
def attention_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules of attention within which something is adapted: a subclass of it."""
    members = {"__module__": kind.__module__, "plain_class": kind, "made_by": (attention_class, kind)}
    return type(f"Adapted{kind.__name__}", (Attention, kind), members)


@cache
def slow_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of encoders, or layers of one, within which something is adapted: a subclass of it."""
    members = {"__module__": kind.__module__, "plain_class": kind, "made_by": (slow_class, kind)}
    return type(f"Slow{kind.__name__}", (Slowly, kind), members)


def see_to_attention(model: nn.Module) -> None:
    """Give torch's modules of attention the class that they need for the layers that are adapted within them now."""
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention):
            maker, mixed, near = attention_class, Attention, module.children()
        elif isinstance(module, tuple(_SLOWLY)):
            maker, mixed, near = slow_class, Slowly, module.modules()
        else:
            continue
        adapted = any(_is_adapted(child) for child in near)
        if adapted and not isinstance(module, mixed):
            change_class(module, maker(type(module)))
        elif not adapted and isinstance(module, mixed):
            change_class(module, without(type(module), maker))


def reads_children(module: nn.Module) -> bool:
    """Whether a module multiplies by the weights of those in it, at times, without calling them."""
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "is_asked")


class WeightStandIn(StandIn):
    """What stands in the place of a weight of attention.

    Args:
        owner, key: as for `StandIn`.
        layers: the adapted layers whose W are rows of it.
        part: where its own rows begin and end; None for all.
    """

    def __init__(self, owner: nn.Module, key: str, layers: Sequence[Any], part: tuple[int, int] | None = None) -> None:
        super().__init__(owner, key)
        self._layers = layers
        self._part = part or (0, len(tensor_of(owner, key)))

    @property
    def _held(self) -> Tensor:
        return tensor_of(self._owner, self._key)[slice(*self._part)]

    @property
    def _remedy(self) -> str:
        return "it out with exclude"

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> Sequence[object]:
        """Return stand-ins for rows one after another."""
        rows = self._part[1] - self._part[0]
        if isinstance(sizes, int):
            sizes = [min(sizes, rows - begin) for begin in range(0, rows, sizes)]
        if dim != 0 or sum(sizes) != rows:
            return self._made().split(sizes, dim)
        begin, found = self._part[0], []
        for size in sizes:
            found.append(WeightStandIn(self._owner, self._key, self._layers, (begin, begin + size)))
            begin += size
        return found

    def chunk(self, count: int, dim: int = 0) -> Sequence[object]:
        """Return stand-ins for equal numbers of rows."""
        return self._made().chunk(count, dim) if dim else self.split(-(-(self._part[1] - self._part[0]) // count))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W'^T + bias, each layer asked for its own rows."""
        size = len(tensor_of(self._owner, self._key))
        own = {getattr(layer, "rows", Rows(0, size, size)): layer for layer in self._layers}
        answers = []
        for rows in places(own):
            begin, end = max(rows.start, self._part[0]), min(rows.start + rows.size, self._part[1])
            if begin >= end:
                continue
            if rows in own:
                answers.append(own[rows](x)[..., begin - rows.start : end - rows.start])
            else:
                answers.append(F.linear(x, tensor_of(self._owner, self._key)[begin:end]))
        y = answers[0] if len(answers) == 1 else torch.cat(answers, -1)
        return y if bias is None else y + bias

    def _made(self, dtype: torch.dtype | None = None) -> Tensor:
        held = tensor_of(self._owner, self._key)
        own = {getattr(layer, "rows", Rows(0, len(held), len(held))): layer for layer in self._layers}
        parts = [
            self._layers_own(own[rows], dtype) if rows in own else rows.of(held).to(dtype or held.dtype)
            for rows in places(own)
        ]
        return torch.cat(parts)[slice(*self._part)]

    def _product(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func is F.multi_head_attention_forward:
            return _attend(*args, **kwargs)
        if func is F.linear and isinstance(args[0], Tensor) and len(args) > 1 and isinstance(args[1], StandIn):
            return args[1].product(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        return None


def _as_written(function: Callable[..., object]) -> Callable[..., object]:
    """Return one of torch's functions as it is where no argument is a tensor of another's making."""
    known = {**function.__globals__, "has_torch_function": lambda tensors: False}
    made = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_attend = _as_written(F.multi_head_attention_forward)

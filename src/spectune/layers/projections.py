"""Projections that lie fused in one linear layer, such as a query's, a key's and a value's: each a layer as any other.

`ProjectionLinear` is the layer; its W is some rows of the fused one's, which, once a part of it is adapted,
puts its answer together from those of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from spectune.layers.packed import is_packed
from spectune.layers.parts import Owner, PartLinear, be_owner, be_plain, tensor_of

QUERY, KEY, VALUE, GATE, UP = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"
# what fused layers are called, and what the linear layer is called that takes what attention answers
_ATTENTION = ("qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv", "att_proj", "qkv_linear")
_ANSWERED = ("o_proj", "out_proj", "dense", "c_proj", "proj", "Wo", "projection")
_MLP = ("gate_up_proj", "Wi")
# classes of attention that hold a head's query, key and value side by side, and not all queries first
_BY_HEAD = ("GPTNeoX", "Bloom", "Persimmon", "MiniMaxLightning")
_FIRST_UP = ("Phi4MultimodalAudioMLP",)  # whose first half is what the gate lets through
_CODEGEN = 4  # groups of heads that lie apart, as they lay on TPU cores


class Rows(NamedTuple):
    """Which rows of a fused weight are a projection's: `size` after `start` in each of `groups` times `period` rows."""

    start: int
    size: int
    period: int
    groups: int = 1

    def of(self, held: Tensor, dim: int = 0) -> Tensor:
        """Return these rows of a tensor, along one of its axes: a view where there is one group."""
        if self.groups == 1:
            return held.narrow(dim, self.start, self.size)
        parts = held.unflatten(dim, (self.groups, self.period)).narrow(dim + 1, self.start, self.size)
        return parts.flatten(dim, dim + 1)

    def put(self, held: Tensor, part: Tensor, dim: int = 0) -> None:
        """Write these rows of a tensor."""
        into = held.unflatten(dim, (self.groups, self.period)).narrow(dim + 1, self.start, self.size)
        into.copy_(part.unflatten(dim, (self.groups, self.size)))


class ProjectionLinear(PartLinear):
    """The linear layer of one projection in a fused layer, whose bias stays the fused layer's.

    Args:
        fused: the fused layer, its owner.
        name: of the projection in it.
        rows: of the fused W that are its own.
        key: the name of that W.
    """

    name: str
    rows: Rows

    def __init__(self, fused: nn.Module, name: str, rows: Rows, key: str = "weight") -> None:
        conv1d = isinstance(fused, Conv1D)
        super().__init__(fused, key, (rows.size * rows.groups, tensor_of(fused, key).shape[0 if conv1d else 1]))
        vars(self).update(name=name, rows=rows)

    @property
    def is_held_transposed(self) -> bool:
        return isinstance(self.owner, Conv1D)

    def part(self, held: Tensor) -> Tensor:
        return self.rows.of(held.mT if self.is_held_transposed else held)

    def put(self, held: Tensor, weight: Tensor) -> None:
        self.rows.put(held, weight, 1 if self.is_held_transposed else 0)

    @property
    def place(self) -> str:
        return self.name

    def lender(self) -> Callable[[Tensor], Tensor]:
        rows, dim = self.rows, 1 if self.is_held_transposed else 0
        return lambda tensor: rows.of(tensor.detach(), dim)

    def join(self) -> None:
        be_owner(self.owner, fused_class)
        self.owner._modules[self.name] = self

    def leave(self) -> None:
        del self.owner._modules[self.name]
        be_plain(self.owner, fused_class)


class FusedLinear(Owner):
    """Mixed into the class of a fused layer some of whose projections are adapted."""

    def adapted_parts(self) -> Iterator[tuple[str, Any]]:
        yield from ((key, part) for key, part in self._modules.items() if isinstance(part, ProjectionLinear))

    def forward(self, input: Tensor, *more: object, **named: object) -> Tensor:
        if more or named or not (torch.compiler.is_compiling() or self.asked()):
            return super().forward(input, *more, **named)
        adapted = dict(self.adapted_parts())
        there = places(part.rows for part in adapted.values())
        groups = there[0].groups
        plain = tensor_of(self, "weight")
        plain = plain.mT if isinstance(self, Conv1D) else plain
        answers = []
        for rows in there:
            layer = next((part for part in adapted.values() if part.rows == rows), None)
            answers.append(F.linear(input, rows.of(plain)) if layer is None else layer(input))
        if groups > 1:
            answers = [y.unflatten(-1, (groups, rows.size)) for y, rows in zip(answers, there, strict=True)]
        y = torch.cat(answers, -1)
        y = y.flatten(-2) if groups > 1 else y
        bias: Any = self.bias
        return y if bias is None else y + bias.to(y.dtype)


def places(adapted: Iterable[Rows]) -> list[Rows]:
    """Return all rows of a fused layer in order, given those of adapted parts: these, and what lies between them."""
    own = sorted(adapted)
    period, groups = own[0].period, own[0].groups
    found: list[Rows] = []
    end = 0
    for rows in [*own, Rows(period, 0, period, groups)]:
        if rows.start > end:
            found.append(Rows(end, rows.start - end, period, groups))
        if rows.size:
            found.append(rows)
        end = rows.start + rows.size
    return found


@cache
def fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of fused layers some of whose projections are adapted: a subclass, so that isinstance holds."""
    members = {"__module__": kind.__module__, "plain_class": kind, "made_by": (fused_class, kind)}
    return type(f"Split{kind.__name__}", (FusedLinear, kind), members)


def projections(around: nn.Module, key: str) -> dict[str, Rows]:
    """Return the rows of each projection that a linear layer holds, by name; nothing where it holds one.

    Known are layers by the names that transformers gives them.  Which rows are whose follows from the layer that takes
    what attention answers, from the number of heads, and from the class around; any rows would do, as an adapter's
    answer is right whichever they are.

    Args:
        around: the module that holds the layer.
        key: the layer's name in it.
    """
    layer = around._modules.get(key)
    if key not in (*_ATTENTION, *_MLP) or not isinstance(layer, (nn.Linear, Conv1D)) or is_packed(layer):
        return {}
    if isinstance(layer, PartLinear):  # an adapted expert, which is a layer as a whole before it is adapted too
        return {}
    out, into = tensor_of(layer, "weight").shape if not isinstance(layer, Conv1D) else (layer.nf, layer.nx)
    if key in _MLP:
        half = out // 2
        names = (UP, GATE) if type(around).__name__ in _FIRST_UP else (GATE, UP)
        return {} if out % 2 else _side_by_side(zip(names, (half, half), strict=True))
    answered = next((m for n in _ANSWERED if isinstance(m := around._modules.get(n), (nn.Linear, Conv1D))), None)
    width = into if answered is None else answered.nx if isinstance(answered, Conv1D) else answered.in_features
    if "q_attn" in around._modules:  # cross-attention: the queries come from elsewhere
        return _side_by_side([(KEY, out // 2), (VALUE, out // 2)]) if out % 2 == 0 else {}
    kind, heads = type(around).__name__, _heads(around)
    if kind.startswith("CodeGen") and out == 3 * width and width % _CODEGEN == 0:
        return _side_by_side([(n, width // _CODEGEN) for n in (QUERY, VALUE, KEY)], _CODEGEN)
    if kind.startswith("Falcon"):
        return _of_falcon(around, out, width, heads)
    if kind.startswith(_BY_HEAD) or (kind.startswith("GPTBigCode") and out == 3 * width):
        if not heads or out != 3 * width or width % heads:
            return {}
        return _side_by_side([(n, width // heads) for n in (QUERY, KEY, VALUE)], heads)
    if out <= width or (out - width) % 2:
        return {}
    rest = (out - width) // 2
    return _side_by_side([(QUERY, width), (KEY, rest), (VALUE, rest)])


def _side_by_side(sizes: Iterable[tuple[str, int]], groups: int = 1) -> dict[str, Rows]:
    sizes = list(sizes)
    period, found, start = sum(size for _, size in sizes), {}, 0
    for name, size in sizes:
        found[name] = Rows(start, size, period, groups)
        start += size
    return found


def _heads(around: nn.Module) -> int | None:
    """Return the number of heads of a module of attention, as it or its configuration says."""
    for holder in (around, getattr(around, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_head"):
            if type(number := getattr(holder, name, None)) is int and number > 0:
                return number
    return None


def _of_falcon(around: Any, out: int, width: int, heads: int | None) -> dict[str, Rows]:
    """Falcon's groups are a key's: its queries, the key and the value; one of all heads, or one of each."""
    if not heads or width % heads:
        return {}
    size, newer = width // heads, getattr(around, "new_decoder_architecture", False)
    groups = around.num_kv_heads if newer else 1 if getattr(around, "multi_query", False) else heads
    if out != (heads + 2 * groups) * size or heads % groups:
        return {}
    return _side_by_side([(QUERY, heads // groups * size), (KEY, size), (VALUE, size)], groups)


def projection_layer(fused: nn.Module, name: str, rows: Rows) -> ProjectionLinear:
    """Return the layer of a projection: the one that is adapted, or one made now."""
    there = fused._modules.get(name)
    return there if isinstance(there, ProjectionLinear) else ProjectionLinear(fused, name, rows)


def projection_layers(around: nn.Module, key: str) -> Mapping[str, ProjectionLinear]:
    """Return the layers of the projections that a linear layer of a module holds, by name."""
    fused: Any = around._modules.get(key)
    return {name: projection_layer(fused, name, rows) for name, rows in projections(around, key).items()}

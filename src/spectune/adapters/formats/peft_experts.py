"""Experts in PEFT's format: the factors of all experts of a tensor lie in one pair, as `target_parameters` has them.

PEFT nests a wrapper for each of a module's tensors, the first innermost, so that the second's keys are the module's own
and the first's those of its `base_layer`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectune.adapters.contents import Contents
from spectune.adapters.terms import LayerUpdate
from spectune.errors import SpectuneError
from spectune.layers.experts import KEYS
from spectune.methods.lora import LoRA

_MOST_EXPERTS = 4096
_INNER = ".base_layer"
_READ_SWAPPED = ("Llama4",)  # classes of whose experts PEFT takes the inputs for the outputs


class Stack(NamedTuple):
    """The LoRA of all experts of one tensor.

    Args:
        module: as the keys name it.
        rank, alpha: of each expert.
        A: (experts * rank x in), those of one expert side by side.
        B: (out x rank * experts), those of one column side by side.
    """

    module: str
    rank: int
    alpha: float
    A: Tensor
    B: Tensor


def obstacle(adapter: Contents) -> str | None:
    """Return what PEFT's format cannot hold of an adapter's experts, or None."""
    for name, layer in adapter.layers.items():
        method = layer.terms[0].method
        if layer.experts and (not isinstance(method, LoRA) or method.dropout):
            return f"other than plain LoRA without dropout on the experts of {name!r}"
    for (owner, key), layers in _grouped(adapter).items():
        if len(layers) != layers[min(layers)].experts:
            return f"some of the experts of '{owner}.{key}' alone"
    return None


def stacks(adapter: Contents) -> dict[str, Stack]:
    """Return the tensors of experts by the name of their parameter, for an adapter without an `obstacle`."""
    found = {}
    groups = _grouped(adapter)
    for (owner, key), layers in groups.items():
        keys = [other for other in KEYS if (owner, other) in groups]
        module = owner + _INNER * (len(keys) - 1 - keys.index(key))
        terms = [layers[i].terms[0] for i in sorted(layers)]
        pairs = [(t.trained["A"], t.trained["B"]) for t in terms]
        method = terms[0].method
        assert isinstance(method, LoRA)
        rank, alpha = method.rank, method.alpha
        if any(term.method != method for term in terms):  # the largest rank, filled up with zeros, and s = 1
            rank = max(len(A) for A, _ in pairs)
            alpha = math.sqrt(rank) if method.rslora else float(rank)
            pairs = [
                (_filled(t.trained["A"], 0, rank), _filled(t.trained["B"] * _scale(t.method), 1, rank)) for t in terms
            ]
        if is_swapped(adapter):
            pairs = [(B.mT, A.mT) for A, B in pairs]
        A, B = torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=-1).flatten(1)
        found[f"{owner}.{key}"] = Stack(module, rank, alpha, A, B)
    return found


def unstacked(modules: Iterable[str], targets: list[str]) -> dict[str, tuple[str, str]]:
    """Return for each module that stands for experts their module, and the name of their tensor.

    Args:
        modules: as the keys of A and B name them.
        targets: names or suffixes of parameters, PEFT's `target_parameters`.
    """
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for module in modules:
        owner = module
        while owner.endswith(_INNER):
            owner = owner.removesuffix(_INNER)
        owners[owner].append(module)
    found = {}
    for owner, wrappers in owners.items():
        full = [(key, f"{owner}.{key}") for key in KEYS]
        keys = [key for key, name in full if any(name == t or name.endswith(f".{t}") for t in targets)]
        if keys and len(keys) == len(wrappers):
            inwards = sorted(wrappers, key=len)
            found |= {module: (owner, key) for module, key in zip(inwards, reversed(keys), strict=True)}
    return found


def experts_of(
    name: str, A: Tensor, B: Tensor, rank: int, swapped: bool, where: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors (rank x in) and (out x rank) of each expert.

    Args:
        name: of the parameter.
        A, B: of all of them.
        rank: of each.
        swapped: PEFT took inputs for outputs.
        where: the file, for messages.

    Raises:
        SpectuneError: the tensors are not those of experts of that rank.
    """
    count, rest = divmod(len(A), rank) if rank > 0 else (0, 1)
    if A.dim() != 2 or B.dim() != 2 or rest or not 0 < count <= _MOST_EXPERTS or B.shape[1] != len(A):
        raise SpectuneError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of {name!r} in {where} are not those of experts of "
            f"rank {rank}"
        )
    for a, b in zip(A.reshape(count, rank, -1), B.reshape(len(B), rank, count).unbind(-1), strict=True):
        yield (b.mT.contiguous(), a.mT.contiguous()) if swapped else (a.contiguous(), b.contiguous())


def is_swapped(adapter: Contents) -> bool:
    """Whether PEFT takes the inputs of the experts of the adapter's model for their outputs."""
    return bool(adapter.architecture) and adapter.architecture[0].startswith(_READ_SWAPPED)


def _grouped(adapter: Contents) -> dict[tuple[str, str], dict[int, LayerUpdate]]:
    groups: defaultdict[tuple[str, str], dict[int, LayerUpdate]] = defaultdict(dict)
    for name, layer in adapter.layers.items():
        if layer.experts:
            owner, number, key = name.rsplit(".", 2)
            groups[owner, key][int(number)] = layer
    return dict(groups)


def _filled(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _scale(method: object) -> float:
    assert isinstance(method, LoRA)
    return method.scale

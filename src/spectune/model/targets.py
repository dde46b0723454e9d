"""Which layers a method goes to: linear ones, and those of other kinds that are named."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch.nn as nn

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted
from spectune.layers.attention import in_projections
from spectune.layers.experts import ExpertLinear, keys_of
from spectune.layers.kinds import kind_of
from spectune.layers.modules import (
    effective_weight,
    find_linear,
    is_another_function,
    is_linear,
    linear_layers,
    named_modules,
    stored_weight,
)
from spectune.layers.parts import Owner, PartLinear
from spectune.layers.reads import replaced_forward
from spectune.layers.taking import answers_otherwise
from spectune.methods import Method, parse
from spectune.methods.head import Head
from spectune.model.asked import past_layers
from spectune.model.patterns import Patterns, Precise, by_pattern, found, in_blocks, matching

Targets = Patterns | Mapping[str, Method | str | None]
ALL_LINEAR = "all-linear"
_NEARLY_ALL = 0.9  # of the weights, below which what is left out is worth a warning


def resolve(
    model: nn.Module,
    method: Method | str | None,
    targets: Targets = ALL_LINEAR,
    exclude: Patterns = (),
    overrides: Mapping[str, Method | str | None] | None = None,
    heads: Iterable[str] = (),
    **narrowed: Any,
) -> dict[str, Method]:
    """Return the method of each layer to be adapted, in the model's order: as `choose` does, as the layers take it."""
    methods = choose(model, method, targets, exclude, overrides, heads, **narrowed)
    return fitted(model, methods)


def fitted(model: nn.Module, methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return each layer's method with a rank of at most what the layer has room for."""
    return {name: m.fit(*effective_weight(find_linear(model, name)).shape) for name, m in methods.items()}


def choose(
    model: nn.Module,
    method: Method | str | None,
    targets: Targets = ALL_LINEAR,
    exclude: Patterns = (),
    overrides: Mapping[str, Method | str | None] | None = None,
    heads: Iterable[str] = (),
    *,
    layers_to_transform: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    split: Literal["auto"] | None = None,
) -> dict[str, Method]:
    """Return the method that is wanted for each layer, in the model's order.

    Layers of other kinds than linear ones (`spectune.layers.kinds`) are taken where they are named.

    A pattern is the whole name, a suffix of it at a dot, the name of a module around layers, or (one string) a regex
    that matches the whole name.  In `overrides`, and in `targets` that map patterns to methods, it may be a regex of
    what follows a dot as well; there one by whole name goes before one by regex, that before one by suffix, and that
    before a module around; `exclude` goes before them all.  The linear layers named in `heads` are each a `Head`,
    whatever the targets.

    Raises:
        SpectuneError: a pattern that matches no linear layer; the nearest names are listed.
    """
    if split not in (None, "auto"):
        raise SpectuneError(f"split must be 'auto' or None, not {split!r}")
    others = _others(model)
    every = linear_layers(model, split=split == "auto", others=True)
    names = [name for name in every if name not in others]
    layers = {name: every[name] for name in names if kind_of(every[name]) is None}
    if not names:
        raise SpectuneError("the model has no linear layer to adapt")
    alone = frozenset(name for name in names if name not in layers)
    tensors = tensors_of(every)
    dropped = set(matching(exclude, names, "exclude", alone=alone, tensors=tensors)) if exclude else set()
    ask = partial(found, names=names, regex=True, loose=True, others=others, alone=alone, tensors=tensors)
    if isinstance(targets, Mapping):
        if method is not None:
            raise SpectuneError("targets that map patterns to methods say each layer's: leave the method out")
        chosen = _by_precedence(targets, "targets", ask)
    else:
        if method is None:
            raise SpectuneError("no method is given: say which, or map targets to methods")
        taken = _all_linear(model, layers, dropped) if targets == ALL_LINEAR else None
        if taken is None:
            taken = matching(targets, names, "targets", others=others, alone=alone, tensors=tensors)
        chosen = dict.fromkeys(taken, parse(method))
    kept = set(in_blocks(list(chosen), layers_to_transform, layers_pattern))
    methods: dict[str, Method | None] = {n: m for n, m in chosen.items() if n in kept and n not in dropped}
    whole = set(heads)
    methods |= {name: Head(bias=layers[name].bias is not None) for name in whole}
    dropped -= whole
    methods |= _by_precedence(overrides or {}, "overrides", ask)
    final = {name: m for name in names if name not in dropped and (m := methods.get(name)) is not None}
    if not final:
        why = "exclude and overrides take away every target"
        if targets == ALL_LINEAR and not exclude and not overrides:
            why = _why_none_is_linear(names, layers)
        raise SpectuneError(f"nothing is left to adapt: {why}")
    for field, patterns in (("rank", rank_pattern), ("alpha", alpha_pattern)):
        _set_by_pattern(final, field, patterns or {}, tensors)
    check_asked(model, final)
    return final


def _set_by_pattern(
    methods: dict[str, Method], field: str, patterns: Mapping[str, float], tensors: Mapping[str, str]
) -> None:
    updated = [name for name, m in methods.items() if not m.replaces]
    for name, value in by_pattern(patterns, updated, f"{field}_pattern", tensors).items():
        methods[name] = _with_field(methods[name], field, value, name)


def _why_none_is_linear(names: Sequence[str], layers: Mapping[str, nn.Module]) -> str:
    if layers:
        return f"every linear layer is an output embedding ({', '.join([*layers][:3])}): name targets"
    return f"the model has no linear layer; name layers of other kinds, such as {names[0]!r}, as targets"


def _all_linear(model: nn.Module, layers: Mapping[str, nn.Module], dropped: set[str]) -> list[str]:
    """Return the names of every linear layer that an adapter has an effect on, but the output embedding's."""
    outputs = output_embeddings(model)
    past = never_asked(model, layers)
    chosen = [name for name in layers if layers[name] not in outputs and name not in past]
    left_out = [name for name in past if name in layers and layers[name] not in outputs and name not in dropped]
    if left_out and not chosen:
        check_asked(model, left_out)
    if left_out:
        warnings.warn(f"left out of {ALL_LINEAR!r}: {_told(left_out, past)}", stacklevel=5)
    return chosen


def say_what_is_covered(model: nn.Module) -> None:
    """Log which weights "all-linear" cannot take, and the share of those outside embeddings that it can."""
    layers = linear_layers(model)
    outputs = output_embeddings(model)
    aside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m in outputs for p in m.parameters()}
    taken = {id(stored_weight(layer)) for layer in layers.values()}
    # what a weight is computed from, as weight_norm does
    taken |= {id(p) for layer in layers.values() if stored_weight(layer) is None for p in layer.parameters()}
    total, left = 0, defaultdict[str, int](int)
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or id(parameter) in aside:
                continue
            aside.add(id(parameter))
            total += parameter.numel()
            if id(parameter) not in taken:
                left[_any_number(f"{name}.{key}")] += parameter.numel()
    if not left:
        return
    covered = 1 - sum(left.values()) / total
    most = sorted(left, key=lambda name: -left[name])
    more = f" and {len(most) - 3} more" if len(most) > 3 else ""
    logging.getLogger("spectune").log(
        logging.INFO if covered >= _NEARLY_ALL else logging.WARNING,
        f"{ALL_LINEAR!r} covers {covered:.0%} of the weights outside embeddings; it cannot take "
        f"{', '.join(most[:3])}{more}",
    )


def _by_precedence(
    patterns: Mapping[str, Method | str | None], what: str, ask: Callable[..., Mapping[str, Precise]]
) -> dict[str, Method | None]:
    """Return the method, or None, of each layer that patterns name: the most precise one's, the first of equal ones."""
    levels: dict[int, dict[str, Method | None]] = {level: {} for level in sorted(Precise)}
    for pattern, replacement in patterns.items():
        method = None if replacement is None else parse(replacement)
        for name, level in ask(pattern, what=what).items():
            levels[level].setdefault(name, method)
    methods: dict[str, Method | None] = {}
    for level in levels.values():
        methods |= level
    return methods


def tensors_of(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the names of the tensors that experts' weights lie in, by layer: PEFT's `target_parameters`."""
    experts = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertLinear)}
    return {name: f"{name.removesuffix(f'.{layer.place}')}.{layer.key}" for name, layer in experts.items()}


def _with_field(method: Method, field: str, value: object, name: str) -> Method:
    """Return a method, or one around another, with another rank or alpha."""
    if field in {f.name for f in dataclasses.fields(method)}:
        return dataclasses.replace(method, **{field: value})
    inner = getattr(method, "inner", None)
    if not isinstance(inner, Method):
        raise SpectuneError(f"{field}_pattern: {name!r} has {method.name}, which has no {field}")
    return dataclasses.replace(method, inner=_with_field(inner, field, value, name))


def _others(model: nn.Module) -> dict[str, str]:
    """Return the modules that hold weights and cannot be adapted, by name, with what they are."""
    found = {}
    for name, module in named_modules(model):
        ours = hasattr(module, "plain_class")
        if not name or ours or is_linear(module) or all(p is None for p in module._parameters.values()):
            continue
        if in_projections(module) or keys_of(module):  # which stand for the layers in them
            continue
        refused = "" if (kind := kind_of(module)) is None else kind.refusal(module)
        if refused is None and answers_otherwise(module):
            refused = "that answers otherwise than its class does"
        if refused is not None:
            found[name] = f"{type(module).__name__} {refused}".rstrip()
    return found


def never_asked(model: nn.Module, names: Iterable[str] = ()) -> dict[str, str]:
    """Return the linear layers that a model goes past, by name, each with what happens there instead.

    An adapter on such a layer would have no effect, no gradient, and yet change what merging gives.

    Args:
        model: the model.
        names: layers of which those that are projections in such a layer, or no linear ones, are told of as well.
    """
    wanted = set(names)
    layers = {
        name: layer
        for name, layer in linear_layers(model, others=True).items()
        if kind_of(layer) is None or name in wanted  # others are adapted where they are named, and tried then
    }
    past = {}
    for name, layer in layers.items():
        if not isinstance(layer, Adapted) and replaced_forward(_called(layer)):
            past[name] = "another function was put in the place of the layer's forward method"
        elif kind_of(layer) is None and not isinstance(layer, (Adapted, Owner)) and is_another_function(layer):
            past[name] = f"{type(layer).__name__} answers otherwise than with x W^T + b"
    past = past_layers(model, layers) | past
    return past | {name: past[fused] for name in wanted if (fused := name.rpartition(".")[0]) in past}


def _called(layer: nn.Module) -> nn.Module:
    """Return the module that a model calls for a layer's answer."""
    return layer.owner if isinstance(layer, PartLinear) else layer


def check_asked(model: nn.Module, names: Iterable[str]) -> None:
    """Raise unless a model calls each of these layers.

    Raises:
        SpectuneError: it goes past one; the layer is named.
    """
    names = list(names)
    past = never_asked(model, names)
    hit = [name for name in names if name in past]
    if hit:
        raise SpectuneError(f"an adapter would have no effect on {_told(hit, past)}; take other targets, or exclude it")


def _told(names: list[str], reasons: Mapping[str, str]) -> str:
    """Return the names, a block's for all blocks, with the reason of the first."""
    kinds = dict.fromkeys(map(_any_number, names))
    shown = repr(names[0]) if len(names) == 1 else ", ".join(map(repr, kinds))
    return f"{shown}, because {reasons[names[0]]}"


def _any_number(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def output_embeddings(model: nn.Module) -> set[nn.Module]:
    """Return a model's output embeddings: what it and the models in it say they are, tied layers, and lm_head(s)."""
    found: set[nn.Module] = set()
    layers = linear_layers(model)
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            found |= set(head.modules())
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, layer in layers.items():
        *around, last = name.split(".")
        numbered = last.isdecimal() and around[-1:] == ["lm_heads"]
        if id(layer._parameters.get("weight")) in tables or last in ("lm_head", "lm_heads") or numbered:
            found.add(layer)
    return found

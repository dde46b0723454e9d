"""Which linear layers a method goes to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn as nn

from spectune.errors import SpectuneError, nearest
from spectune.layers.adapted import Adapted
from spectune.layers.modules import effective_weight, is_another_function, linear_layers
from spectune.layers.reads import replaced_forward
from spectune.methods import Method, parse
from spectune.methods.head import Head
from spectune.model.asked import read_by_the_model

Targets = str | Iterable[str]
ALL_LINEAR = "all-linear"


def resolve(
    model: nn.Module,
    method: Method,
    targets: Targets = ALL_LINEAR,
    exclude: Targets = (),
    overrides: Mapping[str, Method | str | None] | None = None,
    heads: Iterable[str] = (),
) -> dict[str, Method]:
    """Return the method of each layer to be adapted, in the model's order.

    A pattern is the whole name, a suffix of it at a dot, or (one string) a regex that matches the whole name.  An
    override by whole name goes before one by regex, and that before one by suffix; `exclude` goes before them all.
    A method's rank is at most what a layer has room for, and the linear layers named in `heads` are each a `Head`,
    whatever the targets.

    Raises:
        SpectuneError: a pattern that matches no linear layer; the nearest names are listed.
    """
    layers = linear_layers(model)
    linears = list(layers)
    if not linears:
        raise SpectuneError("the model has no linear layer to adapt")
    dropped = set(matching(exclude, linears, "exclude")) if exclude else set()
    if targets == ALL_LINEAR:
        outputs = output_embeddings(model)
        past = never_asked(model)
        chosen = [name for name in linears if layers[name] not in outputs and name not in past]
        left_out = [name for name in past if layers[name] not in outputs and name not in dropped]
        if left_out and not chosen:
            check_asked(model, left_out)
        if left_out:
            warnings.warn(f"left out of {ALL_LINEAR!r}: {_told(left_out, past)}", stacklevel=3)
    else:
        chosen = matching(targets, linears, "targets")
    methods: dict[str, Method | None] = {name: method for name in chosen if name not in dropped}
    whole = set(heads)
    methods |= {name: Head(bias=layers[name].bias is not None) for name in whole}
    dropped -= whole
    by_precedence: list[dict[str, Method | None]] = [{}, {}, {}]
    for pattern, override in (overrides or {}).items():
        replacement = None if override is None else parse(override)
        for name in matching((pattern,), linears, "overrides", regex=True):
            level = 2 if name == pattern else 0 if name.endswith(f".{pattern}") else 1
            by_precedence[level].setdefault(name, replacement)
    for level in by_precedence:
        methods |= level
    final = {
        name: m.fit(*effective_weight(layers[name]).shape)
        for name in linears
        if name not in dropped and (m := methods.get(name)) is not None
    }
    if not final:
        raise SpectuneError("nothing is left to adapt: exclude and overrides take away every target")
    check_asked(model, final)
    return final


def never_asked(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that a model goes past, by name, each with what happens there instead.

    An adapter on such a layer would have no effect, no gradient, and yet change what merging gives.
    """
    layers = linear_layers(model)
    owners = {child: module for module in model.modules() for child in module.children()}
    past = {}
    for name, layer in layers.items():
        if isinstance(owners.get(layer), (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            past[name] = "torch's own attention and encoder read its weight, at times, without calling the layer"
        elif not isinstance(layer, Adapted) and replaced_forward(layer):
            past[name] = "another function was put in the place of the layer's forward method"
        elif not isinstance(layer, Adapted) and is_another_function(layer):
            past[name] = f"{type(layer).__name__} answers otherwise than with x W^T + b"
    read = "the model reads its weight itself instead of calling the layer"
    return past | {name: read for name in read_by_the_model(model, layers) if name not in past}


def check_asked(model: nn.Module, names: Iterable[str]) -> None:
    """Raise unless a model calls each of these layers.

    Raises:
        SpectuneError: it goes past one; the layer is named.
    """
    past = never_asked(model)
    hit = [name for name in names if name in past]
    if hit:
        raise SpectuneError(f"an adapter would have no effect on {_told(hit, past)}; take other targets, or exclude it")


def _told(names: list[str], reasons: Mapping[str, str]) -> str:
    """Return the names, a block's for all blocks, with the reason of the first."""
    kinds = dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)
    shown = repr(names[0]) if len(names) == 1 else ", ".join(map(repr, kinds))
    return f"{shown}, because {reasons[names[0]]}"


def matching(patterns: Targets, names: list[str], what: str, *, regex: bool = False) -> list[str]:
    """Return the names of linear layers that patterns match, in the patterns' order.

    Args:
        patterns: whole names or suffixes at a dot; a regex of the whole name where it is one string.
        names: to choose from.
        what: the setting's name, for messages.
        regex: patterns in a list may be regexes too.

    Raises:
        SpectuneError: a pattern that matches none; the nearest names are listed.
    """
    one = isinstance(patterns, str)
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = [n for n in names if n == pattern or n.endswith(f".{pattern}")]
        if not matched and (one or regex):
            matched = [n for n in names if _regex(pattern, what).fullmatch(n)]
        if not matched:
            tails = [n.rpartition(".")[2] for n in names]
            raise SpectuneError(
                f"{what}: {pattern!r} matches no linear layer{nearest(pattern, [*tails, *names])} "
                f"(the model has {', '.join(dict.fromkeys(tails))})"
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _regex(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SpectuneError(f"{what}: {pattern!r} is not a valid regular expression: {error}") from None


def output_embeddings(model: nn.Module) -> set[nn.Module]:
    """Return a model's output embeddings: what it and the models in it say they are, tied layers, and lm_head(s)."""
    found: set[nn.Module] = set()
    layers = linear_layers(model)
    for module in model.modules():
        get: Any = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            found |= set(head.modules())
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, layer in layers.items():
        if id(layer._parameters.get("weight")) in tables or {"lm_head", "lm_heads"} & set(name.split(".")[-2:]):
            found.add(layer)
    return found

"""Which linear layers a method goes to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn as nn

from spectune.errors import SpectuneError, nearest
from spectune.layers.modules import effective_weight, is_linear
from spectune.methods import Method, parse
from spectune.methods.head import Head

Targets = str | Iterable[str]
ALL_LINEAR = "all-linear"
FRESH = "spectune_fresh"  # an attribute of a layer that the checkpoint did not have


def resolve(
    model: nn.Module,
    method: Method,
    targets: Targets = ALL_LINEAR,
    exclude: Targets = (),
    overrides: Mapping[str, Method | str | None] | None = None,
) -> dict[str, Method]:
    """Return the method of each layer to be adapted, in the model's order.

    A pattern is the whole name, a suffix of it at a dot, or (one string) a regex that matches the whole name.  An
    override by whole name goes before one by regex, and that before one by suffix; `exclude` goes before them all.
    A method's rank is at most what a layer has room for, and the new head of `load_base(..., labels=...)` is always a
    `Head`.

    Raises:
        SpectuneError: a pattern that matches no linear layer; the nearest names are listed.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module) and not _used_raw(model, name)]
    if not linears:
        raise SpectuneError("the model has no linear layer to adapt")
    if targets == ALL_LINEAR:
        head = _output_embedding(model)
        chosen = [name for name in linears if model.get_submodule(name) is not head]
    else:
        chosen = matching(targets, linears, "targets")
    dropped = set(matching(exclude, linears, "exclude")) if exclude else set()
    methods: dict[str, Method | None] = {name: method for name in chosen if name not in dropped}
    # learned in full, whatever the targets: the base has nothing there to adapt
    fresh = {name for name in linears if getattr(model.get_submodule(name), FRESH, False)}
    methods |= {name: Head(bias=model.get_submodule(name).bias is not None) for name in fresh}
    dropped -= fresh
    by_precedence: list[dict[str, Method | None]] = [{}, {}, {}]
    for pattern, override in (overrides or {}).items():
        replacement = None if override is None else parse(override)
        for name in matching((pattern,), linears, "overrides", regex=True):
            level = 2 if name == pattern else 0 if name.endswith(f".{pattern}") else 1
            by_precedence[level].setdefault(name, replacement)
    for level in by_precedence:
        methods |= level
    final = {
        name: m.fit(*effective_weight(model.get_submodule(name)).shape)
        for name in linears
        if name not in dropped and (m := methods.get(name)) is not None
    }
    if not final:
        raise SpectuneError("nothing is left to adapt: exclude and overrides take away every target")
    return final


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


def _output_embedding(model: Any) -> Any:
    get: Any = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _used_raw(model: nn.Module, name: str) -> bool:
    """Whether torch's own attention or encoder reads the layer's weight, at times, without calling the layer."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, (nn.MultiheadAttention, nn.TransformerEncoderLayer))

"""Where a matrix stands in its model, read from its name."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple


class Place(NamedTuple):
    """Where a matrix stands.

    Args:
        module: the layer's whole name.
        layer: index of its block; None outside the blocks.
        kind: what it is in its block ("q_proj"), the shortest name that no other kind has.
        expert: its index among the experts, None where there are none.
        stacked: it is part of a tensor of several, or not a layer's weight: no adapter goes to it by itself.
    """

    module: str
    layer: int | None
    kind: str
    expert: int | None = None
    stacked: bool = False


def is_embedding(module: str) -> bool:
    """Whether a name is that of an embedding or of the output head, which methods leave alone."""
    if module in ("output", "cls.predictions.decoder"):
        return True
    return bool(re.search(r"embed|embd|(^|\.)(wte|wpe|shared|lm_head|relative_attention_bias)(\.|$)", module))


def places(modules: list[str]) -> dict[str, Place]:
    """Return the places of layers, given the names of all that are looked at.

    The first number in a name is the block, one after `experts` the expert; the rest is the kind.
    """
    parsed = {module: _parse(module) for module in modules}
    short = _shortest([template for template, _, _ in parsed.values()])
    return {m: Place(m, layer, short[template], expert) for m, (template, layer, expert) in parsed.items()}


def override_names(modules: list[str]) -> dict[str, str]:
    """Return for each layer the pattern by which `overrides` finds it, whatever the model's class puts in front.

    It begins at the list of blocks (`layers.3.self_attn.q_proj`), as far as that tells the layer from all others.
    """
    ends: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        parts = module.split(".")
        for i in range(len(parts)):
            ends[".".join(parts[i:])].add(module)
    return {module: _from_blocks(module, ends) for module in modules}


def _from_blocks(module: str, ends: dict[str, set[str]]) -> str:
    parts = module.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    for start in range(max(0, block - 1), 0, -1):
        if len(ends[".".join(parts[start:])]) == 1:
            return ".".join(parts[start:])
    return module


def _parse(module: str) -> tuple[str, int | None, int | None]:
    layer = expert = None
    parts = module.split(".")
    for i, part in enumerate(parts):
        if not part.isdecimal():
            continue
        if i and parts[i - 1] == "experts":
            expert, parts[i] = int(part), "*"
        elif layer is None:
            layer, parts[i] = int(part), "*"
    return ".".join(parts), layer, expert


def _shortest(templates: list[str]) -> dict[str, str]:
    ends: defaultdict[str, set[str]] = defaultdict(set)
    split = {t: t.split(".") for t in dict.fromkeys(templates)}
    for template, parts in split.items():
        for i in range(len(parts)):
            ends[".".join(parts[i:])].add(template)
    short = {}
    for template, parts in split.items():
        tails = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        found = next(tail for tail in tails if len(ends[tail]) == 1 or tail == template)
        short[template] = found.removeprefix("*.")
    return short if len(set(short.values())) == len(short) else {t: t for t in split}

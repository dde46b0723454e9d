"""Which modules an adapter brings whole: those asked for, and those that the checkpoint lacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch.nn as nn

from spectune.adapters.terms import WholeTerm
from spectune.errors import SpectuneError, nearest
from spectune.layers.attention import reads_children
from spectune.layers.modules import find_module, is_linear, named_modules, stored_weight
from spectune.model.fresh import fresh_modules, fresh_rows
from spectune.model.patterns import Regex

# names or suffixes of modules, or for each the rows of an embedding to train, None for all of the module
ModulesToSave = str | Iterable[str] | Mapping[str, Sequence[int] | None]


Wanted = dict[str, list[int] | None]  # modules that own parameters: the rows to train, or None for all


def resolve_whole(model: nn.Module, modules_to_save: ModulesToSave = ()) -> Wanted:
    """Return the modules to be trained whole: those that are asked for, and those that the checkpoint lacked.

    A module that owns no parameters stands for those inside it that do; tied weights are trained together.

    Raises:
        SpectuneError: a pattern that matches no module with parameters, or rows of what is no embedding.
    """
    modules = {name: module for name, module in named_modules(model) if _has_parameters(module)}
    asked = modules_to_save if isinstance(modules_to_save, Mapping) else _as_mapping(modules_to_save)
    # what the checkpoint lacked was drawn at random: left as it is, it could not be had again from the base
    wanted: Wanted = dict.fromkeys(fresh_modules(model))
    wanted |= {name: rows for name, rows in fresh_rows(model).items() if name not in wanted}
    for pattern, rows in asked.items():
        found = _matching(pattern, modules, isinstance(modules_to_save, str))
        if rows is not None:
            wanted |= {name: _rows(name, modules[name], rows) for name in found}
        else:
            wanted |= {owner: None for name in found for owner in _owners(name, modules[name])}
    return _with_tied(model, wanted)


def fresh_heads(model: nn.Module) -> list[str]:
    """Return the linear layers that are trained whole because the checkpoint lacked them."""
    return [name for name, rows in resolve_whole(model).items() if is_head(model, name, rows)]


def with_tied_rows(model: nn.Module, modules: Mapping[str, Sequence[WholeTerm]]) -> dict[str, Sequence[WholeTerm]]:
    """Return modules with the rows of an embedding in what is tied to it too, as PEFT has them."""
    found = dict(modules)
    for name, parts in modules.items():
        if parts[0].rows is not None:
            found |= {n: parts for n in _with_tied(model, {name: None}) if n not in modules}
    return found


def is_head(model: nn.Module, name: str, rows: Sequence[int] | None) -> bool:
    """Whether a module is a linear layer to be trained whole, which `Head` does where it holds its weight."""
    owner, layer = find_module(model, name.rpartition(".")[0]), find_module(model, name)
    return rows is None and is_linear(layer) and stored_weight(layer) is not None and not reads_children(owner)


def groups_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the outermost modules all of whose parameters are in modules that are brought whole."""
    brought = set(names)
    found: list[str] = []
    for name, module in named_modules(model):
        inside = set(_owners(name, module))
        if name and inside and inside <= brought and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _with_tied(model: nn.Module, wanted: Wanted) -> Wanted:
    """Return what is wanted with the modules whose weight is that of one of them."""
    # by identity: equal values are no tie, and a tied weight is one parameter under several names
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in named_modules(model):
        if module._parameters.get("weight") is not None:
            names[id(module._parameters["weight"])].append(name)
    found = dict(wanted)
    for name, rows in wanted.items():
        weight = find_module(model, name)._parameters.get("weight")
        for other in names[id(weight)] if weight is not None else ():
            found.setdefault(other, rows)
    return found


def _as_mapping(patterns: str | Iterable[str]) -> dict[str, None]:
    return dict.fromkeys([patterns] if isinstance(patterns, str) else patterns)


def _matching(pattern: str, modules: Mapping[str, nn.Module], regex: bool) -> list[str]:
    found = [name for name in modules if name == pattern or name.endswith(f".{pattern}")]
    if not found and regex:
        compiled = Regex(pattern, "modules_to_save", pattern)
        found = [name for name in modules if compiled.match(name, whole=True)]
    if not found:
        tails = [name.rpartition(".")[2] for name in modules]
        raise SpectuneError(
            f"modules_to_save: {pattern!r} matches no module with parameters{nearest(pattern, [*tails, *modules])}"
        )
    return found


def _owners(name: str, module: nn.Module) -> list[str]:
    """Return the modules at and below one that own parameters or statistics."""
    inner = [n for n, m in named_modules(module) if any(p is not None for p in m._parameters.values())]
    return [".".join(filter(None, (name, n))) for n in inner]


def _rows(name: str, module: nn.Module, rows: Sequence[int]) -> list[int]:
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Embedding) and not is_linear(module):
        raise SpectuneError(f"modules_to_save: rows are given of {name!r}, which is a {type(module).__name__}")
    assert weight is not None
    found = sorted(set(rows))
    if not found or not all(type(row) is int and 0 <= row < len(weight) for row in found):
        raise SpectuneError(
            f"modules_to_save: the rows of {name!r} must be whole numbers from 0 to {len(weight) - 1}, not {rows!r:.60}"
        )
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

"""Modules that are trained whole: which they are, and how an adapter's own versions of them get on a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from spectune.adapters.labels import PROBLEMS, Labels
from spectune.adapters.terms import ADDED_BIAS, Term, WholeTerm, as_head
from spectune.errors import SpectuneError, nearest
from spectune.layers.adapted import Adapted
from spectune.layers.attention import IN, InProjection
from spectune.layers.classes import check_free
from spectune.layers.modules import find_module, is_conv1d, is_linear, named_modules
from spectune.layers.parts import Owner, PartLinear
from spectune.layers.projections import KEY, QUERY, VALUE, FusedLinear, ProjectionLinear
from spectune.layers.selection import Selection
from spectune.layers.shards import whole
from spectune.layers.whole import Values, Whole, take_over_whole
from spectune.methods import Method
from spectune.methods.bias import Bias
from spectune.methods.head import Head
from spectune.model.names import updates_of
from spectune.model.wanted import Wanted, is_head

Biases = tuple[dict[str, tuple[Term, ...]], dict[str, tuple[WholeTerm, ...]]]


def statistics(model: nn.Module) -> list[str]:
    """Return the modules that move buffers of their own in training, such as BatchNorm's running means."""
    return [n for n, m in named_modules(model) if isinstance(m, _NormBase) and m.track_running_stats and m._buffers]


def as_layer_is(model: nn.Module, name: str, method: Method) -> Method:
    """Return a method as it is on a layer: a layer that is brought whole has a bias where it has one."""
    if not isinstance(method, Head):
        return method
    return Head(bias=method.bias and find_module(model, name)._parameters.get("bias") is not None)


def check_apart(model: nn.Module, layers: Iterable[str], modules: Iterable[str]) -> None:
    """Raise where one layer would be both adapted and brought whole, by this adapter or by it and another.

    Raises:
        SpectuneError: there is such a layer.
    """
    found = {n: _find(model, n) for n in layers}
    for name, layer in found.items():
        if isinstance(layer, ProjectionLinear):
            fused = name.rpartition(".")[0]
            if fused in found or isinstance(layer.owner, Adapted):
                raise SpectuneError(_two_ways(fused, name))
        elif isinstance(layer, FusedLinear):
            raise SpectuneError(_two_ways(name, f"{name}.{next(layer.adapted_parts())[0]}"))
        if isinstance(layer, InProjection) and layer.name == IN:
            others = [n for n in found if n.rpartition(".")[0] == fused] + list(layer.owner._modules)
            if parts := {QUERY, KEY, VALUE} & {n.rpartition(".")[2] for n in others}:
                raise SpectuneError(_two_ways(name, f"{fused}.{min(parts)}"))
        elif isinstance(layer, InProjection) and IN in layer.owner._modules:
            raise SpectuneError(_two_ways(f"{fused}.{IN}", name))
    around = {n.removesuffix(f".{layer.place}") if isinstance(layer, PartLinear) else n for n, layer in found.items()}
    owners = {n.rpartition(".")[0] for n, layer in found.items() if not isinstance(layer, PartLinear)}
    around |= {n for n in owners if isinstance(_find(model, n), nn.MultiheadAttention)}  # which reads its out_proj
    for name in [*(n for n in around if isinstance(_find(model, n), Whole)), *modules]:
        if isinstance(_find(model, name), (Adapted, Owner)) or name in around:
            raise SpectuneError(
                f"{name!r} would be adapted and have rows or tensors of its own as well: leave it out of one of the two"
            )


def _two_ways(fused: str, part: str) -> str:
    return (
        f"{fused!r} would be adapted as one layer, and {part!r}, which is a part of it, by itself: take split='auto' "
        "for all adapters on a model or for none"
    )


def prepare(model: nn.Module, modules: Mapping[str, Sequence[WholeTerm]]) -> dict[str, Values]:
    """Return what an adapter has in place of the tensors of modules; the model is not touched.

    Raises:
        SpectuneError: a module that is not there, or has other tensors than the adapter's.
    """
    for name in modules:
        module = _find(model, name)
        check_free(name, module, Whole)
        if module._forward_pre_hooks and any(isinstance(value, Tensor) for value in vars(module).values()):
            raise SpectuneError(
                f"{name!r} cannot be brought whole: a hook computes its weight from other parameters, as the older "
                "torch.nn.utils.weight_norm does: take torch.nn.utils.parametrizations.weight_norm, or remove it"
            )
    return {name: _values(name, _find(model, name), terms) for name, terms in modules.items()}


def put(model: nn.Module, values: Mapping[str, Values], name: str, selection: Selection) -> None:
    """Put an adapter's own versions of modules on a model."""
    for module_name, own in values.items():
        module = find_module(model, module_name)
        taken = module if isinstance(module, Whole) else take_over_whole(module, module_name, selection)
        taken.adapters[name] = own.train(module.training)
        if own.rows is None:  # rows of an embedding are what they are in a longer one
            selection.note(taken, module_name)
    _tie(model, name)


def split_linear(
    model: nn.Module, modules: Mapping[str, Sequence[WholeTerm]], adapted: Collection[str] = ()
) -> tuple[dict[str, tuple[Term, ...]], dict[str, Sequence[WholeTerm]]]:
    """Return the terms of linear layers that an adapter brings whole, or whose bias it brings, and the other modules.

    Args:
        model: the model.
        modules: what the adapter brings whole.
        adapted: names of the layers that it adapts; of those that are no linear layers it may bring the bias.

    Raises:
        SpectuneError: a layer that is not there, or has no bias.
    """
    found: dict[str, tuple[Term, ...]] = {}
    rest: dict[str, Sequence[WholeTerm]] = {}
    for name, parts in modules.items():
        module = _find(model, name)
        bias = name in adapted and all(part.tensors.keys() in ({"bias"}, {ADDED_BIAS}) for part in parts)
        ours = bias or is_head(model, name, parts[0].rows)
        terms = [term for part in parts if (term := _as_term(name, module, part)) is not None] if ours else []
        if len(terms) == len(parts):
            found[name] = tuple(terms)
        else:
            rest[name] = parts
    return found, rest


def _as_term(name: str, layer: nn.Module, part: WholeTerm) -> Term | None:
    own = layer._parameters.get("bias")
    if part.tensors.keys() == {ADDED_BIAS}:
        return Term(Bias(), {"d": part.tensors[ADDED_BIAS]}, part.weight)
    if part.tensors.keys() == {"bias"}:
        if own is None:
            raise SpectuneError(f"the adapter belongs to another base: {name!r} has no bias here")
        return Term(Bias(), {"d": part.tensors["bias"] - own.detach().cpu().float()}, part.weight)
    head = as_head(part, is_conv1d(layer))
    if head is not None:
        _check_shape(name, "weight", cast(Tensor, layer._parameters["weight"]), part)
    return head


def biases(model: nn.Module, layers: Mapping[str, Sequence[Term]], which: str, wanted: Iterable[str]) -> Biases:
    """Return the terms of layers with their biases, and the other modules with theirs, that train beside an adapter.

    Args:
        model: the model.
        layers: those that are adapted.
        which: "none", "lora_only" (of the adapted layers) or "all".
        wanted: modules that are trained whole.

    Raises:
        SpectuneError: another word.
    """
    if which not in ("none", "lora_only", "all"):
        raise SpectuneError(f"bias must be 'none', 'lora_only' or 'all', not {which!r}")
    terms, modules, apart = {name: tuple(of) for name, of in layers.items()}, {}, set(wanted)
    for name, module in named_modules(model) if which != "none" else ():
        own = module._parameters.get("bias")
        if own is None or name in apart or any(t.method.replaces for t in layers.get(name, ())):
            continue
        if name in layers or (which == "all" and is_head(model, name, None)):
            terms[name] = (*layers.get(name, ()), Term(Bias(), {}))
        elif which == "all":
            modules[name] = (WholeTerm({"bias": own.detach()}),)
    return terms, modules


def trained_beside(model: nn.Module) -> dict[str, WholeTerm]:
    """Return what of the base itself is set to train: it is no adapter's, and would be lost with the model.

    Raises:
        SpectuneError: a tensor of a layer that an adapter is on, so that the two could not be told apart.
    """
    found = {}
    for name, module in named_modules(model):
        own = {k: p for k, p in module._parameters.items() if p is not None and p.requires_grad}
        if not own:
            continue
        if (held := _held_by_peft(name)) is not None:
            raise SpectuneError(
                f"{held!r} is trained whole by PEFT, for each of its adapters: model.save_pretrained(folder) and "
                "spectune.Adapter.load(folder) take it along"
            )
        if isinstance(module, (Adapted, Whole, Owner)):
            raise SpectuneError(
                f"the {next(iter(own))} of {name!r} is set to train beside the adapter on it, which no adapter holds: "
                "freeze it, or merge the adapter and save the model"
            )
        linear = {k: p for k, p in module._parameters.items() if p is not None} if is_linear(module) else own
        tensors = {k: whole(p).cpu().clone() for k, p in linear.items()}
        found[name] = WholeTerm(tensors, complete=is_complete(module, tensors))
    return found


def _held_by_peft(name: str) -> str | None:
    """Return the module that PEFT keeps another version of, of which a module of this name is a part; or None."""
    for inside in (".modules_to_save.", ".token_adapter."):
        if inside in f"{name}.":
            return f"{name}.".partition(inside)[0]
    return None


def is_complete(module: nn.Module, tensors: Iterable[str]) -> bool:
    """Whether tensors by name are all of a module's state."""
    plain = {k for k in module.state_dict() if not k.startswith("adapters.")}
    return plain == set(tensors)


def labels_of(model: nn.Module) -> Labels | None:
    """Return what a classifier's logits stand for, in their order, as far as its config says."""
    config = getattr(model, "config", None)
    names = getattr(config, "id2label", None)
    problem = getattr(config, "problem_type", None)
    return Labels((str(names[i]) for i in sorted(names)), problem if problem in PROBLEMS else None) if names else None


def start_of(model: nn.Module, wanted: Wanted) -> dict[str, tuple[WholeTerm, ...]]:
    """Return the modules as they are, which is where their training starts."""
    found = {}
    for name, rows in wanted.items():
        module = find_module(model, name)
        own = {k: t.detach() for k, t in module._parameters.items() if t is not None}
        if rows is not None:
            own = {"weight": own["weight"][rows]}
        own |= {k: t for k, t in module._buffers.items() if _moves(module) and t is not None}
        found[name] = (WholeTerm(own, rows=None if rows is None else tuple(rows)),)
    return found


def moved_statistics(model: nn.Module) -> dict[str, tuple[WholeTerm, ...]]:
    """Return the statistics that modules move themselves in training, as they are."""
    return {
        name: (WholeTerm({k: t for k, t in find_module(model, name)._buffers.items() if t is not None}),)
        for name in statistics(model)
    }


# -- how it is done


def _values(name: str, module: nn.Module, terms: Sequence[WholeTerm]) -> Values:
    first = terms[0]
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    if len({(term.rows, tuple(term.tensors)) for term in terms}) > 1:
        raise SpectuneError(
            f"the adapters that are added bring different parts of {name!r}; add such as bring the same"
        )
    for key in first.tensors:
        own = module._parameters.get(key, module._buffers.get(key))
        if own is None:
            raise SpectuneError(f"the adapter belongs to another base: {name!r} has no {key!r} here")
        _check_shape(name, key, own, first)
        start = own.detach() if first.rows is None else own.detach()[list(first.rows)]
        tensor = _sum(start, [(t.tensors[key], t.weight) for t in terms])
        if key in module._parameters:
            parameters[key] = tensor.to(own.device, torch.promote_types(own.dtype, torch.float32), copy=True)
        else:
            buffers[key] = tensor.to(own.device, own.dtype, copy=True)
    rows = None if first.rows is None else torch.tensor(first.rows, device=next(iter(parameters.values())).device)
    return Values(parameters, buffers, rows)


def _check_shape(name: str, key: str, own: Tensor, term: WholeTerm) -> None:
    theirs = tuple(term.tensors[key].shape)
    ours = tuple(own.shape) if term.rows is None else (len(term.rows), *own.shape[1:])
    enough = term.rows is None or max(term.rows) < len(own)
    if ours == theirs and enough:
        return
    needed = theirs[0] if term.rows is None else max(term.rows) + 1
    remedy = ""
    if len(ours) == 2 and key == "weight" and ours[1:] == theirs[1:] and needed != len(own):
        remedy = f": call model.resize_token_embeddings({needed}) first, if these are its tokens"
    shape = theirs if term.rows is None else (needed, *theirs[1:])
    raise SpectuneError(
        f"the adapter belongs to another base: {key!r} of {name!r} is {tuple(own.shape)} here and {shape} there{remedy}"
    )


def _sum(start: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return T + sum of w (T_a - T)."""
    if not start.is_floating_point() or (len(parts) == 1 and parts[0][1] == 1.0):
        return parts[0][0].detach()
    start = start.to(parts[0][0].device, torch.promote_types(start.dtype, torch.float32))
    return start + torch.stack([w * (t.detach() - start) for t, w in parts]).sum(0)


def _tie(model: nn.Module, name: str) -> None:
    """Have an adapter's versions of tied tensors be one, where they are equal."""
    tied: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, Whole) and name in module.adapters:
            own = module.adapters[name]
            if "weight" in own._parameters:
                tied[id(module._parameters["weight"])].append((own, "weight"))
        elif isinstance(module, Adapted) and name in module.adapters:
            updates = updates_of(module, name)
            if len(updates) == 1 and updates[0].method.replaces:
                tied[id(module._parameters["weight"])].append((updates[0], "H"))
    for (first, key), *others in tied.values():
        kept: Any = first._parameters[key]
        for other, of in others:
            theirs: Any = other._parameters[of]
            if theirs.shape == kept.shape and torch.equal(theirs, kept):
                other._parameters[of] = kept


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return find_module(model, name)
    except AttributeError:
        names = [n for n, _ in named_modules(model)]
        raise SpectuneError(
            f"the adapter belongs to another base: the model has no module {name!r}{nearest(name, names)}"
        ) from None


def _moves(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats

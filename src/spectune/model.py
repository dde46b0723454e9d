"""Adapters on a whole model: adapt, attach, activate, route, extract, merge and detach."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.adapters.terms import LayerUpdate, Term
from spectune.errors import SpectuneError, nearest
from spectune.install import install, master_dtype, selections
from spectune.layers.adapted import (
    Adapted,
    Mixture,
    Rows,
    Update,
    adapted_layers,
    effective_weight,
    find_linear,
    give_back,
    is_conv1d,
    weight_at,
)
from spectune.layers.shards import is_part, whole
from spectune.methods import Method, parse
from spectune.targets import ALL_LINEAR, FRESH, Targets, resolve

M = TypeVar("M", bound=nn.Module)
# an adapter, adapters with a weight each (or, for each of its layers' names, a weight; 0 elsewhere), or the base alone
Choice = str | Mapping[str, float | Tensor | Mapping[str, float | Tensor]] | None


def adapt(
    model: M,
    method: Method | str,
    targets: Targets = ALL_LINEAR,
    exclude: Targets = (),
    overrides: Mapping[str, Method | str | None] | None = None,
    name: str = "default",
    progress: Any = None,
    *,
    factored: bool = False,
) -> M:
    """Add a trainable adapter to a model, in place: W' = W + s L C R in every target.

    Freezes every parameter but the adapter's, and makes it the one that answers.  W is never written to.

    Args:
        model: any nn.Module with nn.Linear or Conv1D layers, in fp32, bf16 or fp16.
        method: a method such as `PiSSA(rank=16)`, or its text, `"pissa:rank=16"`.
        targets: "all-linear" (all but the output embedding), name suffixes, or a regex for the whole name.
        exclude: suffixes or a regex of layers to leave out.
        overrides: suffix or regex -> another method, or None to leave the layer out.
        name: the adapter's name.
        progress: called as progress(done, total) while weights are decomposed.
        factored: in training mode answer W' x as L C' R x alone where the basis holds all of W (SVF, SVFT): two
            products instead of three, equal up to rounding in W's dtype.

    Returns:
        The model.

    Raises:
        SpectuneError: a target that matches nothing, a layer that cannot take the method, or a name in use.
    """
    _check_name(model, name)
    methods = resolve(model, parse(method), targets, exclude, overrides)
    plan = {layer: (Term(chosen, {}),) for layer, chosen in methods.items()}
    install(model, plan, name, progress=progress)
    _train_only(model, name)
    _start_schedules(model, name)
    for selection in selections(adapted_layers(model)):
        selection.factored = factored
    return model


def attach(model: M, adapter: Adapter, name: str = "default", *, trainable: bool = False, factored: bool = False) -> M:
    """Put an adapter on a model, in place, and make it the one that answers.

    Args:
        model: its base.
        adapter: the adapter.
        name: the name to give it here.
        trainable: let its tensors train and freeze all others; otherwise everything is frozen.
        factored: as for `adapt`.

    Returns:
        The model.

    Raises:
        SpectuneError: the adapter belongs to another base (the layer is named), would not reproduce its update
            there, or the name is in use.
    """
    _check_name(model, name)
    adapter.check_base({n: effective_weight(find_linear(model, n)) for n in adapter.layers})
    plan = {layer_name: layer.terms for layer_name, layer in adapter.layers.items()}
    install(model, plan, name, trained_on={n: layer.base_sketch for n, layer in adapter.layers.items()})
    _train_only(model, name if trainable else None)
    if trainable:
        _start_schedules(model, name)
    for selection in selections(adapted_layers(model)):
        selection.factored = factored
    return model


def activate(model: M, choice: Choice) -> M:
    """Choose what answers: an adapter, a weighted mixture of adapters, or with None the base alone.

    Args:
        model: a model with adapters.
        choice: `"a"`, `{"a": 0.7, "b": 0.3}`, or with weights by layer `{"a": {"model.layers.0.mlp.up_proj": 0.7}}`,
            which are zero in layers that are not named.

    Raises:
        SpectuneError: no adapter, or no adapted layer, of that name is on the model.
    """
    layers = adapted_layers(model)  # once: a look at every module is most of what this costs
    (mixture,) = _mixtures(layers, [choice])
    for selection in selections(layers):
        selection.mixture = mixture
    return model


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Within the context the base alone answers, in evaluation mode; afterwards what answered before does."""
    shared = selections(adapted_layers(model))
    before = [(selection, selection.mixture, selection.rows) for selection in shared]
    training = [module for module in model.modules() if module.training]
    for selection in shared:
        selection.mixture, selection.rows = {}, None
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for selection, mixture, rows in before:
            selection.mixture, selection.rows = mixture, rows
        for module in training:
            module.training = True


class Reference(nn.Module):
    """A model without its adapters, to compare it with; the two share every weight, so that it takes no memory.

    Has no parameters of its own, and answers to what the model does, so that it serves as the `ref_model` of TRL's
    DPOTrainer.

    Args:
        model: the model with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: modes, devices and checkpoints are the model's business

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with base_alone(self.__dict__["model"]):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["model"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


@contextmanager
def route(model: nn.Module, rows: Sequence[Choice], *, stacks: dict[Any, Any] | None = None) -> Iterator[None]:
    """Within the context, give each row of every batch an adapter, a mixture or none.

    `model.generate` may expand each row to its beams or returned sequences.  With gradient checkpointing the backward
    pass belongs in the context too, since it runs the layers again.

    Args:
        model: a model with adapters.
        rows: for each row of the batch, what `activate` takes; a weight may be a tensor (), which gets a gradient.
        stacks: keeps the copies of factors that rows without gradients are answered with, for a context to come; an
            empty mapping at first. Without it they go with the context.

    Raises:
        SpectuneError: an unknown adapter, or later a batch with another number of rows.
    """
    if isinstance(rows, (str, Mapping)) or not len(rows):
        raise SpectuneError("route takes a list with one entry for each row of the batch")
    layers = adapted_layers(model)
    shared = selections(layers)
    before = [(selection, selection.rows, selection.expandable) for selection in shared]
    routed = Rows(_mixtures(layers, rows), stacks)
    generate, own = getattr(model, "generate", None), vars(model).get("generate")

    def expanding(*args: Any, **kwargs: Any) -> Any:
        for selection in shared:
            selection.expandable = True
        try:
            return generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            for selection in shared:
                selection.expandable = False

    for selection in shared:
        selection.rows, selection.expandable = routed, False
    if generate is not None:
        vars(model)["generate"] = expanding
    try:
        yield
    finally:
        for selection, rows_before, expandable in before:
            selection.rows, selection.expandable = rows_before, expandable
        if own is not None:
            vars(model)["generate"] = own
        else:
            vars(model).pop("generate", None)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model."""
    return _names(adapted_layers(model))


def extract(model: nn.Module, name: str = "default") -> Adapter:
    """Return an adapter that is on a model as an `Adapter` of its own, on the CPU.

    Where FSDP2 has sharded the model every process must call it, and the adapter holds neither W nor a basis.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    _known(model, name)
    layers = {}
    for layer_name, layer in adapted_layers(model).items():
        if name not in layer.adapters:
            continue
        terms = []
        for update in _updates(layer, name):
            trained = {k: whole(v).cpu().float().clone() for k, v in update.trained().items()}
            frozen = {k: whole(v) for k, v in layer.tensors(update).items() if k not in trained}
            terms.append(Term(update.method, trained, update.weight, frozen or None))
        weight = effective_weight(layer)
        extracted = LayerUpdate(tuple(weight.shape), tuple(terms), is_conv1d(layer), weight)  # type: ignore[arg-type]
        layers[layer_name] = extracted.sealed() if is_part(weight) else extracted
    config: Any = getattr(model, "config", None)
    brings_head = any(t.method.replaces for layer in layers.values() for t in layer.terms)
    names = getattr(config, "id2label", None) if brings_head else None
    labels = [str(names[i]) for i in sorted(names)] if names else None
    return Adapter(layers, getattr(config, "_name_or_path", None) or None, labels=labels)


def detach(model: M, name: str | None = None) -> M:
    """Take an adapter, or all of them, off a model; with the last one gone its layers are what they were before.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    if name is not None:
        _known(model, name)
    shared = selections(adapted_layers(model))
    for layer in adapted_layers(model).values():
        for gone in [n for n in layer.adapters if name in (None, n)]:
            del layer.adapters[gone]
        used = {update.basis_key for n in layer.adapters for update in _updates(layer, n)}
        for key in layer.bases.keys() - used:
            del layer.bases[key]
        if not layer.adapters:
            give_back(layer)
    in_use = {id(layer.selection) for layer in adapted_layers(model).values()}
    for selection in shared:
        selection.mixture = {n: w for n, w in selection.mixture.items() if name not in (None, n)}
        if id(selection) not in in_use:
            for parameter in selection.frozen:
                parameter.requires_grad_(True)
    return model


def merge(model: M) -> M:
    """Fold what answers now into new weights, and take every adapter off: plain layers again.

    Tied weights stay tied unless an adapter is on one of them.

    Raises:
        SpectuneError: no adapter is on the model, or a layer's weight cannot hold the sum.
    """
    layers = adapted_layers(model)
    _some_adapter(layers)
    merged = {}
    for name, layer in layers.items():
        active = [(n, float(w)) for n in layer.adapters if (w := weight_at(layer.selection.mixture, n, layer))]
        if active:
            merged[name] = _merged_weight(name, layer, active), _merged_bias(layer, active)
    detach(model)
    tied = _tied(model)
    for name, (weight, bias) in merged.items():
        layer = model.get_submodule(name)
        old: Any = layer.weight
        if id(old) in tied and hasattr(model, "config"):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        vars(layer).pop(FRESH, None)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
    return model


# -- how it is done


def _merged_weight(layer_name: str, layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor:
    weight = effective_weight(layer).detach()
    if not weight.is_floating_point():
        raise SpectuneError(
            f"the weight of {layer_name!r} is {weight.dtype} and cannot hold a merged update: dequantize the model "
            "first, or keep the adapter beside it"
        )
    master = master_dtype(weight)
    total = weight.to(master)
    for name, factor in active:
        for update in _updates(layer, name):
            tensors = {
                k: v.detach().to(master) if v.is_floating_point() else v for k, v in layer.tensors(update).items()
            }
            total = total + factor * update.weight * update.method.delta(tensors, weight.to(master))
    total = total.to(weight.dtype)
    return total.T.contiguous() if is_conv1d(layer) else total


def _merged_bias(layer: Adapted, active: Sequence[tuple[str, float]]) -> Tensor | None:
    """Return the layer's new bias, or None where no update has one."""
    own, total = layer.bias, None
    for name, factor in active:
        for update in _updates(layer, name):
            bias = update.method.bias_of(update.trained())
            if bias is not None:
                start = torch.zeros_like(bias) if own is None else own.detach().to(bias.dtype)
                total = (start if total is None else total) + factor * update.weight * (bias.detach() - start)
    return total if total is None else total.to(layer.weight.dtype)


def _train_only(model: nn.Module, name: str | None) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapted_layers(model).values():
        if name is not None and name in layer.adapters:
            layer.adapters[name].requires_grad_(True)  # type: ignore[index]


def _start_schedules(model: nn.Module, name: str) -> None:
    by_method: defaultdict[Method, list[Update]] = defaultdict(list)
    for layer in adapted_layers(model).values():
        for update in _updates(layer, name):
            by_method[update.method].append(update)
    for method, updates in by_method.items():
        method.start_schedule(updates)


def _updates(layer: Adapted, name: str) -> list[Update]:
    return list(layer.adapters[name]) if name in layer.adapters else []  # type: ignore[arg-type]


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules share."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, count in owners.items() if count > 1}


def _names(layers: Mapping[str, Adapted]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))


def _some_adapter(layers: Mapping[str, Adapted]) -> None:
    if not layers:
        raise SpectuneError("the model has no adapter: call spectune.adapt or spectune.attach first")


def _mixtures(layers: Mapping[str, Adapted], choices: Sequence[Choice]) -> list[Mixture]:
    _some_adapter(layers)
    names = _names(layers)
    return [_mixture(choice, names, layers) for choice in choices]


def _mixture(choice: Choice, names: Sequence[str], layers: Mapping[str, Adapted]) -> Mixture:
    if choice is None:
        return {}
    mixture: dict[str, Any] = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    for name, weight in mixture.items():
        _check_known(name, names)
        if not isinstance(weight, Mapping):
            mixture[name] = _weight(name, weight)
            continue
        for layer_name in weight:
            if layer_name not in layers:
                raise SpectuneError(f"the model has no adapted layer {layer_name!r}{nearest(layer_name, layers)}")
        mixture[name] = {layers[layer_name]: _weight(name, w) for layer_name, w in weight.items()}
    return mixture


def _weight(name: str, weight: Any) -> float | Tensor:
    if isinstance(weight, Tensor) and weight.dim() == 0:
        return weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise SpectuneError(f"the weight of adapter {name!r} must be a finite number, not {weight!r}")
    return float(weight)


def _known(model: nn.Module, name: str) -> None:
    _check_known(name, adapter_names(model))


def _check_known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        there = ", ".join(names) if names else "none"
        raise SpectuneError(f"no adapter {name!r} is on the model{nearest(name, names)} (there: {there})")


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise SpectuneError(f"{name!r} cannot be an adapter's name; use letters, digits, '-' and '_'")
    if name in adapter_names(model):
        raise SpectuneError(f"an adapter {name!r} is on the model already; choose another name or detach it first")

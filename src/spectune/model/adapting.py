"""Adapters on a whole model: adapt, attach, activate, route, extract, merge and detach."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn as nn

from spectune.adapters.adapter import Adapter
from spectune.adapters.terms import Term, WholeTerm, unchecked
from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.layers.modules import described, effective_weight, find_linear
from spectune.layers.packed import keep_layout
from spectune.layers.updates import Update
from spectune.layers.whole import whole_modules
from spectune.methods import Method, to_text
from spectune.model.first_pass import watch_first_pass
from spectune.model.install import prepared, put_on, selections
from spectune.model.names import M, check_known_on, check_new_name, method_of, updates_of
from spectune.model.patterns import Patterns
from spectune.model.saving import watch_saving
from spectune.model.targets import ALL_LINEAR, Targets, check_asked, choose, fitted, say_what_is_covered
from spectune.model.wanted import ModulesToSave, is_head, resolve_whole, with_tied_rows
from spectune.model.whole import (
    as_layer_is,
    biases,
    check_apart,
    labels_of,
    moved_statistics,
    prepare,
    put,
    split_linear,
    start_of,
)


def adapt(
    model: M,
    method: Method | str | None = None,
    targets: Targets = ALL_LINEAR,
    exclude: Patterns = (),
    overrides: Mapping[str, Method | str | None] | None = None,
    name: str = "default",
    progress: Callable[[int, int], None] | None = None,
    *,
    layers_to_transform: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    split: Literal["auto"] | None = None,
    modules_to_save: ModulesToSave = (),
    bias: str = "none",
    factored: bool = False,
    dtype: torch.dtype | Literal["base"] | None = None,
) -> M:
    """Add a trainable adapter to a model, in place: W' = W + s L C R in every target.

    Freezes every parameter but the adapter's, and makes it the one that answers.  W is never written to.  What the
    checkpoint lacked (a new head, rows of embeddings for new tokens) is trained and saved whole, and the statistics
    that BatchNorm moves are the adapter's own.

    Args:
        model: any nn.Module with nn.Linear or Conv1D layers, in fp32, bf16 or fp16, or packed in 4 or 8 bits by
            bitsandbytes, torchao or quanto.  Convolutions and embeddings are taken where targets name them.
        method: a method such as `PiSSA(rank=16)`, or its text, `"pissa:rank=16"`.
        targets: "all-linear" (all but the output embedding), suffixes of names or names of modules around layers, or a
            regex for the whole name; or a mapping of suffixes and regexes to methods, `{"q_proj|v_proj": SVF(), "mlp":
            LoRA(8)}`, without `method`.
        exclude: suffixes or a regex of layers to leave out.
        overrides: suffix or regex -> another method, or None to leave the layer out.
        name: the adapter's name.
        modules_to_save: names or suffixes of modules of any kind (heads, norms, embeddings) to train and save whole,
            as PEFT's; a mapping says for each the rows of an embedding to train, or None for all of it.
        bias: "none"; "lora_only" trains the biases of the adapted layers too, "all" every bias of the model.
        layers_to_transform: numbers of the blocks whose targets are taken, as PEFT's.
        layers_pattern: the list that holds these blocks ("layers", "h"); by default the first that is numbered.
        rank_pattern: regex of a name's end -> the rank there, as PEFT's; the first that matches.
        alpha_pattern: the same for alpha.
        split: "auto" takes each projection of a fused layer (GPT-2's c_attn, Phi-3's qkv_proj and gate_up_proj,
            GPT-NeoX's query_key_value) for a layer of its own, `c_attn.q_proj`, with its own decomposition.
        progress: called as progress(done, total) while weights are decomposed.
        factored: in training mode answer W' x as L C' R x alone where the basis holds all of W (SVF, SVFT): two
            products instead of three, equal up to rounding in W's dtype.
        dtype: what the trained tensors are held in: "base" for their weight's dtype; by default float32, or float64
            beside a float64 weight.

    Returns:
        The model.

    Raises:
        SpectuneError: a target that matches nothing, a layer that cannot take the method, or a name in use.
    """
    check_new_name(model, name)
    wanted = resolve_whole(model, modules_to_save)
    heads = [module for module, rows in wanted.items() if is_head(model, module, rows)]
    asked = choose(
        model,
        method,
        targets,
        exclude,
        overrides,
        heads,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        split=split,
    )
    methods = fitted(model, asked)
    plan = {layer: (Term(as_layer_is(model, layer, chosen), {}),) for layer, chosen in methods.items()}
    plan, modules = biases(model, plan, bias, wanted)
    modules = {**moved_statistics(model), **modules}
    modules |= start_of(model, {module: rows for module, rows in wanted.items() if module not in heads})
    _prepared(model, plan, modules, name, progress=progress, dtype=dtype)()
    _say_what_is_less(model, methods, asked)
    if targets == ALL_LINEAR:
        say_what_is_covered(model)
    _let_train(model, [name])
    for selection in selections(adapted_layers(model)):
        selection.factored = factored
    return model


def attach(
    model: M,
    adapter: Adapter,
    name: str = "default",
    *,
    trainable: bool = False,
    factored: bool = False,
    dtype: torch.dtype | Literal["base"] | None = None,
    check: bool = True,
) -> M:
    """Put an adapter on a model, in place, and make it the one that answers.

    Args:
        model: its base.
        adapter: the adapter.
        name: the name to give it here.
        trainable: let its tensors train and freeze all others; otherwise everything is frozen.
        factored: as for `adapt`.
        dtype: as for `adapt`.
        check: refuse a base whose weights are not those that the adapter was trained on, where it knows them; False
            takes any of the same shapes, for a base that was trained on, say.

    Returns:
        The model.

    Raises:
        SpectuneError: the adapter belongs to another base (the layer is named), would not reproduce its update
            there, or the name is in use.
    """
    prepare_attach(model, adapter, name, trainable=trainable, factored=factored, dtype=dtype, check=check)()
    return model


def prepare_attach(
    model: nn.Module,
    adapter: Adapter,
    name: str = "default",
    *,
    trainable: bool = False,
    factored: bool = False,
    dtype: torch.dtype | Literal["base"] | None = None,
    check: bool = True,
) -> Callable[[], None]:
    """Do all of `attach` that takes time, which only reads the model, and return the call that does the rest.

    A model may be answering in another thread meanwhile.  The call must come when nothing else uses the model, and
    before any adapter leaves it.

    Args:
        model, adapter, name, trainable, factored, dtype, check: as for `attach`.

    Raises:
        SpectuneError: as `attach`, and the call for nothing.
    """
    check_new_name(model, name)
    layers = {n: find_linear(model, n) for n in adapter.layers}
    for layer_name, layer in layers.items():
        rows = adapter.layers[layer_name].rows
        if rows is not None and rows != getattr(layer, "rows", None):
            raise SpectuneError(
                f"the adapter's {layer_name!r} is other rows of the fused layer than the model's: {list(rows)} in the "
                f"adapter, {list(getattr(layer, 'rows', []))} in the model"
            )
        ours = described(layer)
        theirs = adapter.layers[layer_name].kind, adapter.layers[layer_name].kernel
        if ours != theirs:
            raise SpectuneError(
                f"the adapter's {layer_name!r} is of another kind than the model's: {_as_words(*theirs)} in the "
                f"adapter, {_as_words(*ours)} in the model"
            )
    check_asked(model, layers)
    adapter.check_base({n: effective_weight(layer) for n, layer in layers.items()}, values=check)
    _check_labels(model, adapter)
    plan = {n: layer.terms if check else tuple(map(unchecked, layer.terms)) for n, layer in adapter.layers.items()}
    linear, others = split_linear(model, adapter.modules, adapter.layers)
    plan |= {n: (*plan.get(n, ()), *terms) for n, terms in linear.items()}
    modules = {**(moved_statistics(model) if trainable else {}), **with_tied_rows(model, others)}
    trained_on = {n: layer.base_sketch for n, layer in adapter.layers.items()} if check else {}
    install_it = _prepared(model, plan, modules, name, trained_on=trained_on, dtype=dtype)

    def put_it() -> None:
        install_it()
        _let_train(model, [name] if trainable else [])
        for selection in selections(adapted_layers(model)):
            selection.factored = factored

    return put_it


def _as_words(kind: str, kernel: tuple[int, ...]) -> str:
    return " ".join([kind, "x".join(map(str, kernel))]).rstrip()


def trainable(model: M, names: str | Iterable[str] | None) -> M:
    """Let these adapters train and no other; what answers, and the base's parameters, stay as they are.

    Args:
        model: a model with adapters.
        names: one name, several, or None for none.

    Returns:
        The model.

    Raises:
        SpectuneError: no adapter of that name is on the model.
    """
    chosen = [] if names is None else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        check_known_on(model, name)
    _let_train(model, chosen)
    return model


def _let_train(model: nn.Module, names: Collection[str]) -> None:
    layers = adapted_layers(model)
    for part in (*layers.values(), *whole_modules(model).values()):
        for name in part.adapters:
            part.adapters[name].requires_grad_(name in names)
    for name in names:
        beginning: defaultdict[Method, list[Update]] = defaultdict(list)
        for layer in layers.values():
            for update in updates_of(layer, name):
                if not update.begun:
                    beginning[method_of(update)].append(update)
                    update.begun = True
        for method, updates in beginning.items():
            method.start_schedule(updates)


def _say_what_is_less(model: nn.Module, methods: Mapping[str, Method], wanted: Mapping[str, Method]) -> None:
    """Warn of layers that have less room than a method's rank, and of those where it can learn nothing."""
    small = {n: m for n, m in methods.items() if m != wanted[n]}
    if small:
        name, method = next(iter(small.items()))
        out_features, in_features = effective_weight(find_linear(model, name)).shape
        warnings.warn(
            f"{_layers(small)} have less room than the rank that was asked for, and take all that there is: {name!r} "
            f"({out_features} x {in_features}) has {to_text(method)}",
            stacklevel=3,
        )
    still = [n for n, m in methods.items() if not m.learns_from_zero and _is_zero(find_linear(model, n))]
    if still:
        warnings.warn(
            f"{methods[still[0]].name} cannot learn where a weight is all zeros, as it is in {_layers(still)}; give "
            "these another method by overrides, such as LoRA, or exclude them",
            stacklevel=3,
        )


def _layers(names: Collection[str]) -> str:
    first = ", ".join(map(repr, list(names)[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _is_zero(layer: nn.Module) -> bool:
    weight = effective_weight(layer)
    return not weight.is_meta and not bool(weight.any())


def _check_labels(model: nn.Module, adapter: Adapter) -> None:
    ours, theirs = labels_of(model), adapter.labels
    if ours is None or theirs is None or sorted(ours) != sorted(theirs):
        return
    if tuple(ours) != tuple(theirs):
        raise SpectuneError(
            f"the adapter's labels are in another order: {', '.join(theirs)}; and here {', '.join(ours)}: load the "
            "base with labels in the adapter's order"
        )
    if ours.problem != theirs.problem:
        raise SpectuneError(
            f"the adapter's head is for {theirs.problem} and the model for {ours.problem}: load the base with "
            "labels=adapter.labels"
        )


def _prepared(
    model: nn.Module,
    plan: Mapping[str, Sequence[Term]],
    modules: Mapping[str, Sequence[WholeTerm]],
    name: str,
    **options: Any,
) -> Callable[[], None]:
    """Return what puts terms on layers and an adapter's own versions of modules on a model, all of it made by now."""
    check_apart(model, plan, modules)
    values = prepare(model, modules)
    ready = prepared(model, plan, name, **options)

    def put_it() -> None:
        put_on(model, ready)
        put(model, values, name, selections(adapted_layers(model))[0])
        keep_layout(model, True)
        watch_saving(model)
        watch_first_pass(model)

    return put_it

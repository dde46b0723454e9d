"""Which adapters answer: one choice for every row, or a choice for each row of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError, nearest
from spectune.layers.mixtures import Mixture
from spectune.layers.modules import modules_around
from spectune.layers.rows import Rows
from spectune.layers.selection import generating, is_generating, within
from spectune.layers.whole import Part, parts_of
from spectune.model.apart import answering_apart
from spectune.model.exchange import exchanged
from spectune.model.install import choose, selections
from spectune.model.names import M, check_known, check_some_adapter, names_on
from spectune.model.row_trial import Call, find_layouts, rows_of
from spectune.speed.recompute_cache import like_learning

if TYPE_CHECKING:
    from spectune.layers.selection import Selection
    from spectune.layers.stacks import Stack

T = TypeVar("T")


# an adapter, adapters with a weight each (or, for each of its layers' names, a weight; 0 elsewhere), or the base alone
Choice = str | Mapping[str, float | Tensor | Mapping[str, float | Tensor]] | None


_trying = RLock()  # one trial at a time: another thread waits for what it finds


def activate(model: M, choice: Choice) -> M:
    """Choose what answers: an adapter, a weighted mixture of adapters, or with None the base alone.

    Args:
        model: a model with adapters.
        choice: `"a"`, `{"a": 0.7, "b": 0.3}`, or with weights by layer `{"a": {"model.layers.0.mlp.up_proj": 0.7}}`,
            which are zero in layers that are not named.

    Raises:
        SpectuneError: no adapter, or no adapted layer, of that name is on the model.
    """
    layers = parts_of(model)  # once: a look at every module is most of what this costs
    choose(layers.values(), mixture_of(layers, choice))
    return model


def mixture_of(layers: Mapping[str, Part], choice: Choice) -> Mixture:
    """Return what a choice means on adapted layers.

    Raises:
        SpectuneError: no adapter, or no adapted layer, of that name is there.
    """
    (mixture,) = _mixtures(layers, [choice])
    return mixture


@contextmanager
def base_alone(model: nn.Module, *, compared: bool = False) -> Iterator[None]:
    """Within the context the base alone answers, in evaluation mode; afterwards what answered before does.

    Args:
        model: the model with adapters.
        compared: it is subtracted from what answers outside of the context. It is computed in the same way then, in the
            model's mode, and equal to the last bit where the adapter does nothing; with gradients where the context is
            entered, as a pass with gradients would be, which go off inside.
    """
    training = [] if compared else [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        shared = selections(parts_of(model))
        with within(shared, {}, compared=compared), like_learning(compared and torch.is_grad_enabled()):
            yield
    finally:
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

    def __call__(self, *args: object, **kwargs: object) -> object:
        with base_alone(self.__dict__["model"]):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.__dict__["model"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


@contextmanager
def route(model: nn.Module, rows: Sequence[Choice], *, stacks: dict[object, Stack] | None = None) -> Iterator[None]:
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
    layers = parts_of(model)
    shared = selections(layers)
    routed = Rows(_mixtures(layers, rows), shared[0].layouts, stacks)
    try:
        with within(shared, routed), _expanding(model, len(rows)), _told_apart(model, layers, routed, shared):
            yield
    finally:
        for stack in routed.stacks.values() if stacks is None else ():
            stack.end()


@contextmanager
def _expanding(model: nn.Module, given: int) -> Iterator[None]:
    """Within the context `model.generate` may make several rows of one: its beams, or its returned sequences."""

    def wrap(generate: Callable[..., T]) -> Callable[..., T]:
        def generate_rows(*args: object, **kwargs: object) -> T:
            # several prompts for an entry look as its beams do from here on
            asked = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
            prompts = next((x for x in asked if isinstance(x, Tensor) and x.dim() > 1), None)
            if prompts is not None and len(prompts) > given:
                raise _another_count(given, tuple(prompts.shape))
            with generating():
                return generate(*args, **kwargs)

        return generate_rows

    if not hasattr(model, "generate"):
        yield
        return
    with exchanged(model, "generate", wrap):
        yield


@contextmanager
def _told_apart(
    model: nn.Module, layers: Mapping[str, Part], routed: Rows, shared: Sequence[Selection]
) -> Iterator[None]:
    """Within the context see to it, before a call of the model or a part of it, that each layer's rows are known."""
    watch = _Watch(model, layers, routed, shared)

    # functions, and not methods of the watch: copying a model copies whatever a hook is a method of, and the copy would
    # have rows of its own that nobody chose. Another thread may have these hooks at hand when they are gone, and then
    # gives them no kwargs
    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object] | None = None) -> None:
        if watch.enters(module, args, kwargs or {}):
            begin()

    def after(module: nn.Module, *given: object) -> None:
        watch.leaves(module)

    with ExitStack() as stack:
        begin = stack.enter_context(answering_apart(shared, routed.layouts, routed))
        for module in watch.within:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        yield


class _Watch:
    """What is told of every call of a model, or of a part of it, within `route`.

    All parts are watched as long as there are layers that no pass has shown, afterwards those that were called.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Part], routed: Rows, shared: Sequence[Selection]) -> None:
        self._model, self._routed, self._shared = model, routed, shared
        self._calls: list[nn.Module] = []  # that have begun and not ended: the first is the one with the batch's rows
        self.within: dict[nn.Module, dict[str, Part]] = {model: dict(layers)}
        layouts = routed.layouts
        new = {layer: name for name, layer in layers.items() if layer not in layouts.shown}
        for layer, name in new.items():
            layouts.names[layer] = name
        if routed.alike or hasattr(model, "_orig_mod"):
            return
        for name, layer in layers.items():
            parts = name.split(".")[:-1]
            for i, module in enumerate(modules_around(model, name)[1:], 1):
                if new or module in layouts.entrances:
                    self.within.setdefault(module, {})[".".join([*parts[i:], name.rpartition(".")[2]])] = layer

    def enters(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Look at the input of a call that begins; returns whether its layers are to tell rows apart.

        Raises:
            SpectuneError: the input has another number of rows, or rows that no layer could tell apart.
        """
        routed = self._routed
        if self._shared[0].scope().choice is not routed:
            return False
        self._calls.append(module)
        if len(self._calls) > 1:
            return False
        given = len(routed.mixtures)
        count = rows_of(args, kwargs, given, is_generating())
        if count is None:
            return False
        if not isinstance(count, int):
            raise _another_count(given, count)
        routed.count = count
        if routed.alike:
            return False
        routed.layouts.entrances.add(module)
        self._try(Call(module, args, kwargs, count))
        return True

    def leaves(self, module: nn.Module) -> None:
        """Take note of a call's end."""
        if self._shared[0].scope().choice is self._routed and self._calls[-1:] == [module]:
            self._calls.pop()
            if not self._calls:
                self._routed.count = None

    def _try(self, call: Call) -> None:
        """Find where a call's rows are in each layer, unless a call like it has shown that."""
        layouts, parts = self._routed.layouts, self.within[call.module]
        structure = call.structure if call.module is self._model else None

        def is_new() -> bool:
            return structure not in layouts.tried | {None} or not layouts.shown.issuperset(parts.values())

        if not is_new():
            return
        _refuse_batch_norm(call.module)
        with _trying:
            if is_new():  # to the thread that came first
                with base_alone(call.module):
                    find_layouts(layouts, call, parts)
                layouts.tried.add(structure)
        self._routed.forget()


def _another_count(given: int, shape: tuple[int, ...]) -> SpectuneError:
    return SpectuneError(
        f"route was given {given} rows and the input of the model is {shape}; give one entry for each row of the batch"
    )


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            raise SpectuneError(
                f"rows cannot have different adapters while {name!r} takes its mean over all of them; set it to eval()"
            )


def _mixtures(layers: Mapping[str, Part], choices: Sequence[Choice]) -> list[Mixture]:
    check_some_adapter(layers)
    names = names_on(layers)
    return [_mixture(choice, names, layers) for choice in choices]


def _mixture(choice: Choice, names: Sequence[str], layers: Mapping[str, Part]) -> Mixture:
    if choice is None:
        return {}
    mixture: dict[str, Any] = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    for name, weight in mixture.items():
        check_known(name, names)
        if not isinstance(weight, Mapping):
            mixture[name] = _weight(name, weight)
            continue
        for layer_name in weight:
            if layer_name not in layers:
                raise SpectuneError(f"the model has no adapted layer {layer_name!r}{nearest(layer_name, layers)}")
        mixture[name] = {layers[layer_name]: _weight(name, w) for layer_name, w in weight.items()}
    return mixture


def _weight(name: str, weight: object) -> float | Tensor:
    if isinstance(weight, Tensor) and weight.dim() == 0:
        return weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise SpectuneError(f"the weight of adapter {name!r} must be a finite number, not {weight!r}")
    return float(weight)

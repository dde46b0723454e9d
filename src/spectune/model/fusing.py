"""One choice for all rows at the speed of the base: W' beside W, or in its place, within a context."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.fused import Fused, InPlace, whole_weight
from spectune.layers.mixtures import Part
from spectune.layers.modules import effective_weight
from spectune.layers.rows import Rows
from spectune.layers.shards import is_part
from spectune.layers.updates import Update
from spectune.layers.whole import parts_of
from spectune.model.names import M, check_some_adapter
from spectune.pages.units import gigabytes
from spectune.speed.dense import one_row_pays
from spectune.speed.laid_out import laid_out
from spectune.speed.room import room

_lock = Lock()
_PLACES = ("beside", "inplace")


@contextmanager
def fused(model: M, *, where: str = "beside") -> Iterator[M]:
    """Within the context what is active answers at the speed of the base: y = W' x + b', W' = W + s L C R made once.

    For every method and for mixtures, in every thread; it takes the adapted layers' memory once more.  W stays as it
    is.  What changes meanwhile is noticed: another choice, a step of training, other values of a weight.  Adapters
    answer as they do outside then, and W' is made anew where the change lasts for a few passes.  So do rows with
    choices of their own, in a `route` inside of the context.  Not noticed is a write by another process, or through an
    alias by `.data` or numpy that was made before the context was entered.

    Args:
        model: a model with adapters, in evaluation mode.
        where: "beside" keeps W and W' in memory. "inplace" writes W' over W and keeps W's own bytes on the CPU, or for
            weights on the CPU in a temporary file, and puts them back at the end, whatever happens; nothing else may be
            asked of the model meanwhile. Weights that layers share stay beside.

    Raises:
        SpectuneError: no adapter, a model in training mode, rows with different choices, or too little memory.
    """
    if where not in _PLACES:
        raise SpectuneError(f"where must be 'beside' or 'inplace', not {where!r}")
    layers = adapted_layers(model)
    check_some_adapter(parts_of(model))
    if any(layer.training for layer in layers.values()):
        raise SpectuneError(
            "fused answers as the model does when it is asked, and it is in training mode: eval() first"
        )
    chosen = []
    for layer in layers.values():
        scope = layer.selection.scope()
        if isinstance(scope.choice, Rows) and not scope.choice.alike:
            raise SpectuneError("fused takes one choice for all rows, and these are in a `route` with different ones")
        parts = layer.parts(scope)
        if any(isinstance(weight, Tensor) for _, weight in parts):
            raise SpectuneError("fused takes weights that are numbers, and an adapter's weight is a tensor")
        if parts and _is_plain(layer):
            chosen.append(layer)
    made: list[tuple[Adapted, Fused]] = []
    with ExitStack() as stack:
        with _lock:
            chosen = [layer for layer in chosen if layer.fused is None]  # else by a context around this one
            shared = _shared_weights(model) if where == "inplace" else set()
            over = [layer for layer in chosen if where == "inplace" and id(layer._parameters["weight"]) not in shared]
            _check_room([layer for layer in chosen if layer not in over])
            room_for = {layer: stack.enter_context(_kept(layer._parameters["weight"])) for layer in over}
            stack.callback(_end, made)
            for layer in chosen:
                one = InPlace(layer, room_for[layer]) if layer in room_for else Fused(layer)
                made.append((layer, one))
                scope = layer.selection.scope()
                if one.make(scope, layer.parts(scope)):
                    layer.fused = one
                else:  # such as weights of inference mode, whose changes go unnoticed
                    one.end()
        yield model


def _end(made: list[tuple[Adapted, Fused]]) -> None:
    for layer, one in made:
        one.end()
        if vars(layer).get("fused") is one:
            layer.fused = None


_PASSES = 32  # of few rows, which W' takes as long to make as it saves
_PASSES_OF_FEW = 128  # where it saves little: thin factors beside W, on a processor that W' is not laid out for
_THIN = 64  # a rank up to which factors are thin
_LOST = 0.05  # of an update, that 16 bits may round away
_said: set[str] = set()


@contextmanager
def fused_where_it_pays(model: nn.Module, passes: float, *, allowed: bool = True) -> Iterator[None]:
    """Within the context answer from W' beside W, as `fused` does, where that saves time and changes nothing.

    It is left where it cannot be done, where memory would be short, and where W' in 16 bits would lose a part of the
    update, as a small one added to a large weight does.  On a processor layers without an adapter, the output embedding
    among them, are laid out for its products.

    Args:
        model: a model, with or without adapters.
        passes: forward passes of few rows that are to be expected; 64 tokens in one count for one.
        allowed: False leaves it.
    """
    if not allowed or passes < _PASSES:
        yield
        return
    layers = adapted_layers(model)
    with ExitStack() as stack:
        if layers and _may_be_fused(layers.values(), passes):
            try:
                stack.enter_context(fused(model))
            except SpectuneError:  # memory that is short by now
                pass
            else:
                _say("answering from merged weights beside the base's, until it is done; fused: false leaves it")
        stack.enter_context(laid_out(model, room(torch.device("cpu"))))
        yield


def _may_be_fused(layers: Iterable[Adapted], passes: float) -> bool:
    layers = list(layers)
    used, need = [], 0
    for layer in layers:
        scope = layer.selection.scope()
        if layer.training or layer.fused is not None or (isinstance(scope.choice, Rows) and not scope.choice.alike):
            return False
        parts = layer.parts(scope)
        if any(isinstance(weight, Tensor) for _, weight in parts):
            return False
        if parts and _is_plain(layer):
            used.append((layer, parts))
    need = room_needed([layer for layer, _ in used])
    if not used or used[0][0]._parameters["weight"].is_meta or 2 * need > room(used[0][0]._parameters["weight"].device):
        return False
    pays = one_row_pays(used[0][0]._parameters["weight"].dtype)
    if passes < _PASSES_OF_FEW and not pays and all(_is_thin(u) for _, parts in used for u, _ in parts):
        return False
    return _lost(used[:: max(1, len(used) // 4)]) <= _LOST


def _is_thin(update: Update) -> bool:
    """Whether an update adds little to the time of W."""
    inner = getattr(update.method, "inner", update.method)  # of DoRA, whose ratio is one product more
    return getattr(inner, "rank", math.inf) <= _THIN


@torch.no_grad()
def _lost(layers: Sequence[tuple[Adapted, list[Part]]]) -> float:
    """Return the part of the updates of some layers that W' in W's dtype has not."""
    held = total = 0.0
    for layer, parts in layers:
        weight = effective_weight(layer).detach()
        if weight.dtype.itemsize > 2:
            continue
        exact = whole_weight(layer, parts, torch.float32)
        update, rounded = exact - weight, exact.to(weight.dtype) - weight.float()
        held, total = held + float((rounded * update).sum()), total + float(update.square().sum())
    return abs(1 - held / total) if total else 0.0


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logging.getLogger("spectune").info(text)


def _is_plain(layer: Adapted) -> bool:
    """Whether a layer multiplies by a weight that it holds, and holds whole."""
    weight = layer._parameters.get("weight")
    return layer.is_plain and weight is not None and not is_part(weight) and weight.is_floating_point()


def room_needed(layers: Iterable[Any]) -> int:
    """Return the bytes that W' takes beside W."""
    return sum(layer._parameters["weight"].numel() * layer._parameters["weight"].itemsize for layer in layers)


def _check_room(layers: Sequence[Any]) -> None:
    devices = {layer._parameters["weight"].device for layer in layers}
    for device in devices:
        need = room_needed(layer for layer in layers if layer._parameters["weight"].device == device)
        if device.type != "meta" and need > (free := room(device)):
            raise SpectuneError(
                f"fused keeps the adapted layers' weights once more, which takes {gigabytes(need)}, and {device} has "
                f'{gigabytes(free)} free: use where="inplace", or answer unfused'
            )


def _shared_weights(model: nn.Module) -> set[int]:
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, count in counts.items() if count > 1}


@contextmanager
def _kept(weight: Tensor) -> Iterator[Tensor]:
    """Within the context keep a tensor's bytes off its device: on the CPU, or in a temporary file."""
    if weight.device.type != "cpu":
        yield weight.detach().cpu()
        return
    with tempfile.TemporaryDirectory(prefix="spectune-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "weight"
        held = torch.from_file(str(path), shared=True, size=weight.numel(), dtype=weight.dtype).view(weight.shape)
        held.copy_(weight.detach())
        try:
            yield held
        finally:
            del held

"""The first forward pass of a model with adapters: watched for layers that it goes past, where no trial could."""

from __future__ import annotations

import warnings
from threading import Lock, get_ident
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.modules import stored_weight, tied_parameters
from spectune.layers.parts import PartLinear
from spectune.layers.reads import bypassed
from spectune.layers.shards import is_part
from spectune.layers.values import PLAIN
from spectune.model.asked import Watch
from spectune.private import is_transformed


def watch_first_pass(model: nn.Module) -> None:
    """Have the first forward pass of a model tell of adapted layers that it goes past, where no trial could.

    It sees what is taken of a weight whatever way it came: `layer._parameters`, `named_parameters()`, `state_dict()`.
    """
    unseen = any(not layer.is_called for layer in _watchable(model).values())
    if unseen and not isinstance(model, Adapted) and _first_pass_of(model) is None:
        watch = _FirstPass()
        model.register_forward_pre_hook(watch.before, prepend=True)
        model.register_forward_hook(watch.after, always_call=True)


def leave_first_pass(model: nn.Module) -> None:
    """Watch no first pass of models without adapters any more."""
    for module in model.modules():
        if _first_pass_of(module) is not None and not adapted_layers(module):
            _drop_first_pass(module)


class _FirstPass:
    """The hooks of a model whose first forward pass with adapters is watched."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._thread: int | None = None  # that of the pass that is watched; one at a time
        self._depth = 0  # of the model in itself
        self._watch: Watch | None = None

    def before(self, model: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or getattr(model, "_is_replica", False):
            return
        if torch.jit.is_tracing():  # which compares what it writes of two passes, of which one would be watched
            raise SpectuneError(
                "a model with adapters cannot be traced in its first pass, which shows whether it goes past an adapted "
                "layer: pass the batch through it once before torch.jit.trace"
            )
        with self._lock:
            if self._thread == get_ident():
                self._depth += 1
            if self._thread is not None:
                return
            self._thread, self._depth = get_ident(), 1
        layers: dict[str, nn.Module] = {n: layer for n, layer in _watchable(model).items() if layer._asks()}
        if not layers:
            return
        watch = self._watch = Watch(layers, _memory)
        weights = [w for layer in layers.values() if (w := stored_weight(layer)) is not None]
        # where several lie in one piece of memory, that does not tell which is which
        watch.stand_for({id(w): w for w in weights if _memory(w) and w.untyped_storage().nbytes() == w.nbytes})
        # a layer's own product may be one node of autograd's, which no mode sees into
        for name, layer in layers.items():
            watch.hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: watch.asked.add(name)))
        watch.__enter__()

    def after(self, model: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or self._thread != get_ident():
            return
        self._depth -= 1
        if self._depth:
            return
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
            for hook in watch.hooks:
                hook.remove()
        if watch is None or output is None:  # as where the pass has failed
            self._thread = None
            return
        past = [name for name in watch.past if name not in watch.asked]
        if past:
            self._thread = None
            raise SpectuneError(bypassed(past[0]))
        _drop_first_pass(model)  # by the thread whose pass it was: others have begun none
        beside = watch.read_past(tied_parameters(model))
        if beside:
            shown = ", ".join(map(repr, sorted(beside)[:3]))
            warnings.warn(
                f"the model calls {shown} and takes values of the weights themselves as well, which are the base's "
                "without the adapters",
                stacklevel=2,
            )

    def __deepcopy__(self, memo: object) -> _FirstPass:
        return _FirstPass()

    def __reduce__(self) -> tuple[object, ...]:
        return _FirstPass, ()


def _watchable(model: nn.Module) -> dict[str, Adapted]:
    layers = adapted_layers(model)
    return {
        n: layer
        for n, layer in layers.items()
        if not isinstance(layer, PartLinear) and (w := stored_weight(layer)) is not None and not is_part(w)
    }


def _memory(value: object) -> int:
    """Return where a tensor's memory is; 0 for what has none of its own."""
    if type(value) not in (Tensor, *PLAIN) or is_transformed():
        return 0
    tensor: Any = value
    return 0 if tensor.is_meta or tensor.layout is not torch.strided else tensor.untyped_storage().data_ptr()


def _first_pass_of(model: nn.Module) -> _FirstPass | None:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, _FirstPass)), None)


def _drop_first_pass(model: nn.Module) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _FirstPass)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)

"""What a first step gave no gradient, and why, as far as can be told."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn as nn

from spectune.errors import SpectuneError
from spectune.layers.adapted import Adapted, adapted_layers
from spectune.layers.whole import Part, parts_of
from spectune.model.names import check_not_replaced

OnSilent = Literal["raise", "warn"]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Calls:
    """Which adapted layers a model calls within `watched`, and whether with gradients.

    Attributes:
        with_gradients: names of layers that were called so at least once.
        without: names of layers that were called otherwise.
        known: whether all calls were seen, which is not so where the model is compiled.
    """

    def __init__(self) -> None:
        self.with_gradients: set[str] = set()
        self.without: set[str] = set()
        self.known = True

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Within the context, note the calls of a model's adapted layers."""
        if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
            self.known = False  # a hook would have it compiled again
            yield
            return
        handles = [layer.register_forward_pre_hook(self._note(name)) for name, layer in adapted_layers(model).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Any:
        def note(layer: nn.Module, args: Any) -> None:
            # without a row, as an expert that no token came to, it was not asked
            if not args or not isinstance(args[0], torch.Tensor) or args[0].numel():
                (self.with_gradients if torch.is_grad_enabled() else self.without).add(name)

        return note


def check_gradients(model: nn.Module, calls: Calls | None = None, on_silent: OnSilent = "raise") -> None:
    """Look for adapted layers that a first step gave no gradient.

    Where data chooses among layers of one kind (experts, layers that are dropped at random) and where the loss does
    not depend on a layer's answer (a pooler's), this is a warning.

    Args:
        model: the model, after a backward pass.
        calls: the calls in this step, where they were noted.
        on_silent: "warn" makes of a layer that was never called a warning too.

    Raises:
        SpectuneError: the step gave a gradient to no layer; a layer was replaced after it was adapted; or it was never
            called, or never with gradients, and nothing like it was.
    """
    check_not_replaced(there := parts_of(model))
    parts = {name: part for name, part in there.items() if _trained(part)}
    silent = [name for name, part in parts.items() if any(p.grad is None for p in _trained(part))]
    if not silent:
        return
    if all(p.grad is None for part in parts.values() for p in _trained(part)):
        raise SpectuneError(
            f"no adapted layer got a gradient in the first step, {_shown(silent)} among them: the loss does not depend "
            "on any (is the adapter active?)"
        )
    if calls is None or not calls.known:
        _warn("got no gradient in the first step and train only if a later one reaches them", silent)
        return
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name in silent:
        reasons[_reason(name, parts[name], calls)].append(name)
    for said, names in reasons.items():
        if said in _CERTAIN and on_silent == "raise":
            raise SpectuneError(
                f"the adapter on {_shown(names)} cannot learn: {said}; leave "
                f"{'it' if len(names) == 1 else 'them'} out with exclude=[{names[0]!r}{', ...' if names[1:] else ''}]"
                + (", or set on_silent = 'warn' on the trainer if other batches come there" if said == _NEVER else "")
            )
        _warn(f"got no gradient in the first step: {said}", names)


_NEVER = "the model never called it in the first step, so that it does not use it or reads its weight itself"
_WITHOUT = "the model calls it without gradients"
_CHOSEN = "others like it were called, and these train only if a later step reaches them"
_UNUSED = "the loss does not depend on what they answer"
_CERTAIN = (_NEVER, _WITHOUT)


def _reason(name: str, part: Part, calls: Calls) -> str:
    if not isinstance(part, Adapted) or name in calls.with_gradients:
        return _UNUSED
    if name in calls.without:
        return _WITHOUT
    called = {_kind(n, m) for n in calls.with_gradients for m in _NUMBER.finditer(n)}
    return _CHOSEN if any(_kind(name, m) in called for m in _NUMBER.finditer(name)) else _NEVER


def _kind(name: str, number: re.Match[str]) -> tuple[str, str]:
    """Return a name without one of its numbers."""
    return name[: number.start()], name[number.end() :]


def _trained(part: Part) -> list[nn.Parameter]:
    return [p for p in part.adapters.parameters() if p.requires_grad]


def _warn(said: str, names: Collection[str]) -> None:
    warnings.warn(
        f"these adapted layers {said}: {_shown(names)}; exclude layers that the task does not use", stacklevel=3
    )


def _shown(names: Collection[str]) -> str:
    return ", ".join(map(repr, list(names)[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

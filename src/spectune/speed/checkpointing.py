"""Activation checkpointing in a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import torch

from spectune.speed.recompute_cache import SameProducts, keep_products, learns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")


def checkpoint_activations(model: PreTrainedModel, how: bool | Literal["selective"]) -> None:
    """Have a model of transformers compute activations again in the backward pass.

    Args:
        model: the model; one that cannot is left alone by "selective".
        how: "selective" keeps the products of linear layers, True only what goes into each block, False everything.
    """
    selective = how == "selective"
    if not how or (selective and not model.supports_gradient_checkpointing):
        return
    options: dict[str, object] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = keep_products
    _named(model, "enable")(options)
    for module in model.modules() if selective else ():
        if (own := vars(module).get("_gradient_checkpointing_func")) is not None:
            vars(module)["_gradient_checkpointing_func"] = partial(_pass, own)


def _pass(own: Callable[..., T], block: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    if torch.is_grad_enabled() or not learns():
        return own(block, *args, **kwargs)
    with SameProducts():
        return block(*args, **kwargs)


def keep_activations(model: PreTrainedModel) -> None:
    """Undo `checkpoint_activations`."""
    _named(model, "disable")()


def _named(model: PreTrainedModel, action: str) -> Callable[..., None]:
    """Return the model's own method, under its new name where transformers has it."""
    new, old = f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}"
    return getattr(model, new, None) or getattr(model, old)

"""What other libraries save of an adapted model: the model as it answers, and not the base with unknown keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn as nn

from spectune.errors import SpectuneError
from spectune.layers.classes import blank, change_class, made_of, without
from spectune.layers.modules import named_modules
from spectune.layers.shards import is_part
from spectune.layers.stored import Stored, form_in, stored_as
from spectune.layers.whole import parts_of
from spectune.model.names import check_not_replaced
from spectune.model.ties import say_of_ties, tied_pairs, untie


class Saving:
    """Mixed into the class of a model that has `save_pretrained`: it saves W', which any library loads.

    A folder named checkpoint-N, as trainers write it, holds the adapters' own tensors too, so that a run goes on.
    """

    def save_pretrained(self, *args: object, **kwargs: object) -> object:
        """Write the model as it answers now: with its adapters merged.

        Raises:
            SpectuneError: the model is sharded or offloaded, a weight cannot hold its update, or a layer was replaced
                after it was adapted.
        """
        model: Any = self
        check_not_replaced(parts_of(model))
        if any(is_part(parameter) or parameter.is_meta for parameter in model.parameters()):
            raise SpectuneError(
                "a model with adapters that is sharded or offloaded cannot be saved merged: save the adapter with "
                "spectune.extract(model).save(folder)"
            )
        kwargs.pop("state_dict", None)  # of the model as it is, with keys that no base has
        folder = args[0] if args else kwargs.get("save_directory", "")
        form, save = form_in(folder), super().save_pretrained  # type: ignore[misc]
        if form == "both" and "save_original_format" in signature(save).parameters:
            kwargs["save_original_format"] = False  # else experts have other names there than the trainer loads
        with stored_as(form), _as_untied(model):
            return save(*args, **kwargs)

    @property
    def is_quantized(self) -> bool:
        """False: transformers' trainers ask whether nothing can be trained, as in a model of packed weights alone."""
        return False

    def load_state_dict(self, state_dict: Mapping[str, object], *args: object, **kwargs: object) -> object:
        """Load a state, of this model with its adapters.

        Raises:
            SpectuneError: it is the state of a merged model, whose weights the adapters would change once more.
        """
        for name, part in _stored(self).items():  # type: ignore[arg-type]
            part.check_state(state_dict, f"{name}.")  # all of them before any tensor is copied
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        # the class is made at run time: copies and pickles name the one that it was made from
        return blank, made_of(type(self)), *super().__reduce_ex__(protocol)[2:]


def watch_saving(model: nn.Module) -> None:
    """Have every model in a model that knows how to save itself save what its adapters make of it."""
    for module in list(model.modules()):
        kind = type(module)
        foreign = kind.__module__.partition(".")[0] == "peft"
        if hasattr(kind, "save_pretrained") and not isinstance(module, Saving) and not foreign and parts_of(module):
            change_class(module, _saving_class(kind))


def leave_saving(model: nn.Module) -> None:
    """Give models without adapters their own classes back."""
    for module in list(model.modules()):
        if _saving_class in made_of(type(module))[0] and not parts_of(module):
            change_class(module, without(type(module), _saving_class))


@contextmanager
def _as_untied(model: nn.Module) -> Iterator[None]:
    """Within the context, models whose tied weights the adapters make different say that those are not tied."""
    ties = tied_pairs(model)
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}

    def owner(part: nn.Module, key: str) -> tuple[str, str]:
        module, _, own = f"{prefixes[id(part)]}{key}".rpartition(".")
        return module, own

    named = {owner(part, key)[0] for part, pairs in ties for pair in pairs.items() for key in pair}
    made = {name: part.merged(name) for name, part in _stored(model).items() if name in named}

    def equal(part: nn.Module, first: str, second: str) -> bool:
        a, b = (made.get(module, {}).get(own) for module, own in (owner(part, first), owner(part, second)))
        return a is b if a is None or b is None else torch.equal(a, b)

    before = untie(ties, equal)
    try:
        yield
    finally:
        for part, said in before:
            say_of_ties(part, said)


def _stored(model: nn.Module) -> dict[str, Stored]:
    return {name: module for name, module in named_modules(model) if isinstance(module, Stored)}


@cache
def _saving_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass by the same name, which is what libraries write into their configs."""
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "made_by": (_saving_class, kind)}
    return type(kind.__name__, (Saving, kind), members)

"""What of adapted modules is in a state: W and the adapters beside it, or W' for who saves a model as it answers."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import local
from typing import Any, Literal, NamedTuple
from weakref import ReferenceType, ref

import torch
import torch.nn as nn
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.layers.classes import Remade
from spectune.layers.shards import is_part

MARK = "adapters.merged"  # the tensor beside a weight that says that it is W' here
_CHECKPOINT = re.compile(r"(tmp-)?checkpoint-\d+")  # of transformers' trainers, which go on from it
_ADVICE = "save the adapter with spectune.extract(model).save(folder)"
_BESIDE = re.compile(r"\.adapters\.[^.]+(\.\d+)?\.[^.]+$")  # of adapters' tensors in a state
# "beside": W and the adapters' tensors; "merged": W' alone, as a model without adapters has; "both": W' and the
# adapters' tensors, from which loading makes W again
Form = Literal["beside", "merged", "both"]
_wanted: ContextVar[Form | None] = ContextVar("spectune_state", default=None)


def is_beside(keys: Iterable[str]) -> bool:
    """Whether a state by these keys is W and adapters beside it, of which who knows no adapters takes W alone."""
    keys = list(keys)
    return any(map(_BESIDE.search, keys)) and not any(key.endswith(MARK) for key in keys)


class Stored(Remade, nn.Module):
    """Mixed into adapted layers and modules that adapters bring whole."""

    def merged(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that the adapters that answer now make, by their names in the module."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> object:  # torch.jit.script asks for it first
        raise SpectuneError(
            "torch.jit.script takes no model with adapters: fold them in before it with spectune.merge(model), or take "
            "torch.export or torch.jit.trace"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> object:
        if (fused := vars(self).get("fused")) is not None:
            fused.check_own_weight()
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        asked = _Asked(form) if (form := _wanted.get()) is not None else _asked_for(state)
        if asked.form == "beside":
            return state
        name = prefix.removesuffix(".")
        if any(is_part(parameter) or parameter.is_meta for parameter in self.parameters()):
            raise SpectuneError(f"a model with adapters that is sharded or offloaded cannot be saved merged: {_ADVICE}")
        for key in _own_keys(self, prefix):
            if asked.form == "both":
                state[key] = state[key].clone()  # of its own: what is tied among them need not be in the model
            else:
                del state[key]
        merged = self.merged(name)
        for key, tensor in merged.items():
            owners = asked.owners.get(id(self._parameters.get(key)), [])
            if come_apart(owners):
                raise SpectuneError(
                    f"the {key} of {name!r} is tied to another, and the adapters make two of it: {_ADVICE}, or call "
                    "spectune.merge(model) on the whole model and save that"
                )
            made = tensor.detach().clone() if asked.form == "both" else tensor.detach()
            first = f"{owners[0].name}.{owners[0].key}" if owners else ""
            state[f"{prefix}{key}"] = state[first] if first in state and first != f"{prefix}{key}" else made
        if merged and asked.form == "both":
            state[f"{prefix}{MARK}"] = torch.ones(())
        return state

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        self.check_state(state_dict, prefix)
        if state_dict.pop(f"{prefix}{MARK}", None) is not None:
            own = {**self._parameters, **self._buffers}
            state_dict |= {
                f"{prefix}{k}": t.detach() for k, t in own.items() if t is not None and f"{prefix}{k}" in state_dict
            }
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Raise where a state is that of a merged model, whose weights the adapters would change once more.

        Raises:
            SpectuneError: it is.
        """
        keys = self.adapters_keys(prefix)  # none where PEFT holds the adapters, which compare themselves
        if f"{prefix}{MARK}" in state or not keys or any(key in state for key in keys):
            return
        for key, ours in self._parameters.items():
            theirs = None if key.endswith("bias") else state.get(f"{prefix}{key}")  # PEFT's states have biases alone
            if theirs is None or ours is None or is_part(ours) or ours.is_meta or torch.equal(theirs.to(ours), ours):
                continue
            raise SpectuneError(
                f"the state that is loaded has another {prefix}{key} and no adapter, as a merged model has: load it "
                "into the base, without adapters (spectune.detach(model))"
            )

    def adapters_keys(self, prefix: str) -> list[str]:
        """Return the keys, in a state, of the tensors of the adapters that are on the module."""
        return _own_keys(self, prefix)


def _own_keys(module: nn.Module, prefix: str) -> list[str]:
    adapters = module._modules.get("adapters")  # which a module of experts has not: its layers have
    return [] if adapters is None else [f"{prefix}adapters.{key}" for key in adapters.state_dict()]


class _Asked:
    """Who asks for a state: the form it gets, and who has its parameters, where adapters are on a part of a model.

    Args:
        form: the form.
        model: the model that is saved.
    """

    def __init__(self, form: Form, model: object = None) -> None:
        self.form: Form = form
        self.owners: dict[int, list[Owner]] = owners_in(model) if isinstance(model, nn.Module) else {}


_latest = local()  # the state that a thread is filling, and who asked for it: the same for all its modules


def _asked_for(state: object) -> _Asked:
    """Return who asks for the state that modules one after another add to."""
    known: tuple[ReferenceType[object], _Asked] | None = getattr(_latest, "asked", None)
    if known is not None and known[0]() is state:
        return known[1]
    asked = _who_asks()
    if isinstance(state, OrderedDict):  # of which there are weak references, so that it is nobody's afterwards
        _latest.asked = ref(state, lambda _: vars(_latest).pop("asked", None)), asked
    return asked


@contextmanager
def stored_as(form: Form) -> Iterator[None]:
    """Within the context the states of models have a form, whoever asks for them."""
    token = _wanted.set(form)
    try:
        yield
    finally:
        _wanted.reset(token)


def form_in(folder: object) -> Form:
    """Return the form of the state in a folder that a model is saved to."""
    return "both" if _CHECKPOINT.fullmatch(Path(str(folder)).name) else "merged"


def _who_asks() -> _Asked:
    """Return who asks for a state: savers of others, and of models around the adapted one, want it as it answers.

    These are `save_pretrained` of any library but PEFT, whose folders have no base, and `save_model` of safetensors and
    accelerate.
    """
    frame: object = sys._getframe(3)
    while frame is not None:
        code, library = frame.f_code, frame.f_globals.get("__name__", "").partition(".")[0]
        if code.co_name == "save_pretrained" and code.co_argcount > 1:
            model, folder = (frame.f_locals.get(name) for name in code.co_varnames[:2])
            if type(model).__module__.partition(".")[0] == "peft" or getattr(model, "_hf_peft_config_loaded", False):
                break
            return _Asked(form_in(folder), model)
        if code.co_name == "save_model" and library in ("safetensors", "accelerate") and "model" in frame.f_locals:
            return _Asked("merged", frame.f_locals["model"])
        frame = frame.f_back
    return _Asked("beside")


class Owner(NamedTuple):
    """A module that has a parameter, and the parameter's name there."""

    name: str
    module: nn.Module
    key: str


def owners_in(model: nn.Module) -> dict[int, list[Owner]]:
    """Return the modules of a model that have a parameter, several where it is tied, by the id of each parameter."""
    found: dict[int, list[Owner]] = {}
    for name, module in model.named_modules():
        for key, own in module._parameters.items():
            if own is not None:
                found.setdefault(id(own), []).append(Owner(name, module, key))
    return found


def come_apart(owners: list[Owner]) -> bool:
    """Whether adapters make several tensors of one that modules have."""
    if len(owners) < 2:
        return False
    merged = [owner.module.merged("") if isinstance(owner.module, Stored) else {} for owner in owners]
    made: list[Any] = [m.get(o.key, o.module._parameters[o.key]) for m, o in zip(merged, owners, strict=True)]
    return any(not torch.equal(made[0], other) for other in made[1:])

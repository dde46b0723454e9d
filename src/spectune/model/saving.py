"""What other libraries save of an adapted model: the model as it answers, and not the base with unknown keys."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.layers.classes import blank, change_class, made_of, without
from spectune.layers.experts import ExpertLinear, Experts
from spectune.layers.modules import named_modules
from spectune.layers.shards import is_part
from spectune.layers.whole import whole_modules
from spectune.model.merged import active_adapters, in_experts, merged_bias, merged_weight
from spectune.model.ties import say_of_ties, tied_pairs, untie

_MERGED = "adapters.merged"  # the tensor beside a weight that says that it is W' here
_CHECKPOINT = re.compile(r"(tmp-)?checkpoint-\d+")  # of transformers' trainers, which go on from it
# how a model answers `state_dict`: None as it is; False as one without adapters, its weights W'; True with W' and the
# adapters' own tensors, from which `load_state_dict` makes W and the adapters again
_how: ContextVar[bool | None] = ContextVar("spectune_state", default=None)


class Saving:
    """Mixed into the class of a model that has `save_pretrained`: it saves W', which any library loads.

    A folder named checkpoint-N, as trainers write it, holds the adapters' own tensors too, so that a run goes on.
    """

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the model as it answers now: with its adapters merged.

        Raises:
            SpectuneError: the model is sharded or offloaded, or a weight cannot hold its update.
        """
        model: Any = self
        if any(is_part(parameter) or parameter.is_meta for parameter in model.parameters()):
            raise SpectuneError(
                "a model with adapters that is sharded or offloaded cannot be saved merged: save the adapter with "
                "spectune.extract(model).save(folder)"
            )
        kwargs.pop("state_dict", None)  # of the model as it is, with keys that no base has
        token = _how.set(bool(_CHECKPOINT.fullmatch(Path(save_directory).name)))
        try:
            with _as_untied(model):
                return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            _how.reset(token)

    @property
    def is_quantized(self) -> bool:
        """False: transformers' trainers ask whether nothing can be trained, as in a model of packed weights alone."""
        return False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        how, state = _how.get(), super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if how is None:
            return state
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if ".adapters." in f".{key}"]:
            if how:
                state[key] = state[key].clone()  # of its own: what is tied among them need not be in the model
            else:
                del state[key]
        for name, tensors in merged_tensors(self).items():  # type: ignore[arg-type]
            state.update(
                {f"{prefix}{name}.{key}": tensor.clone() if how else tensor for key, tensor in tensors.items()}
            )
            if how:
                state[f"{prefix}{name}.{_MERGED}"] = torch.ones(())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state, of this model with its adapters.

        Raises:
            SpectuneError: it is the state of a merged model, whose weights the adapters would change once more.
        """
        return super().load_state_dict(_unmerged(self, state_dict), *args, **kwargs)  # type: ignore[misc, arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made at run time: copies and pickles name the one that it was made from
        return blank, made_of(type(self)), *super().__reduce_ex__(protocol)[2:]


def watch_saving(model: nn.Module) -> None:
    """Have every model in a model that knows how to save itself save what its adapters make of it."""
    for module in list(model.modules()):
        kind = type(module)
        foreign = kind.__module__.partition(".")[0] == "peft"
        if hasattr(kind, "save_pretrained") and not isinstance(module, Saving) and not foreign and _parts(module):
            change_class(module, _saving_class(kind))


def leave_saving(model: nn.Module) -> None:
    """Give models without adapters their own classes back."""
    for module in list(model.modules()):
        if _saving_class in made_of(type(module))[0] and not _parts(module):
            change_class(module, without(type(module), _saving_class))


def merged_tensors(model: nn.Module, names: Container[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the weights, biases and other tensors that the adapters that answer now make, by module.

    Args:
        model: a model with adapters.
        names: the modules; None is all.

    Raises:
        SpectuneError: a weight cannot hold its update, or a layer without a bias would need one.
    """
    found: dict[str, dict[str, Any]] = {}
    layers = {name: layer for name, layer in adapted_layers(model).items() if names is None or name in names}
    experts = {n: layer for n, layer in layers.items() if isinstance(layer, ExpertLinear) and active_adapters(layer)}
    owners = {layer.experts: name.rsplit(".", 2)[0] for name, layer in experts.items()}
    made = ((layer, merged_weight(name, layer, active_adapters(layer))) for name, layer in experts.items())
    for (owner, key), tensor in in_experts(made).items():
        found.setdefault(owners[owner], {})[key] = tensor
    for name, layer in layers.items():
        active = active_adapters(layer)
        if not active or name in experts:
            continue
        found[name] = {"weight": merged_weight(name, layer, active).detach()}
        bias = merged_bias(layer, active)
        if bias is None:
            continue
        if layer.bias is None:
            raise SpectuneError(
                f"the adapter gives {name!r} a bias, which the model has no place for: save the adapter with "
                "spectune.extract(model).save(folder)"
            )
        found[name]["bias"] = bias.detach()
    for name, module in whole_modules(model).items():
        active = active_adapters(module) if names is None or name in names else []
        if active:
            found[name] = {key: tensor.detach() for key, tensor in module.mixed(tuple(active)).items()}
    return found


def _unmerged(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    modules: dict[str, nn.Module] = {**adapted_layers(model), **whole_modules(model)}
    modules |= {name: module for name, module in named_modules(model) if isinstance(module, Experts)}
    merged = [name for name in modules if f"{name}.{_MERGED}" in state]
    found = dict(state)
    for name in merged:
        del found[f"{name}.{_MERGED}"]
        own = {**modules[name]._parameters, **modules[name]._buffers}
        found |= {f"{name}.{k}": t.detach() for k, t in own.items() if t is not None and f"{name}.{k}" in found}
    if merged or any(".adapters." in f".{key}" for key in found):
        return found if merged else state
    for name, module in modules.items():
        theirs, ours = found.get(f"{name}.weight"), module._parameters.get("weight")
        if theirs is not None and ours is not None and not torch.equal(theirs.to(ours), ours):
            raise SpectuneError(
                f"the state that is loaded has another {name}.weight and no adapter, as a merged model has: load it "
                "into the base, without adapters (spectune.detach(model))"
            )
    return state


@contextmanager
def _as_untied(model: nn.Module) -> Iterator[None]:
    """Within the context, models whose tied weights the adapters make different say that those are not tied."""
    ties = tied_pairs(model)
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}

    def owner(part: nn.Module, key: str) -> tuple[str, str]:
        module, _, own = f"{prefixes[id(part)]}{key}".rpartition(".")
        return module, own

    made = merged_tensors(
        model, {owner(part, key)[0] for part, pairs in ties for pair in pairs.items() for key in pair}
    )

    def equal(part: nn.Module, first: str, second: str) -> bool:
        a, b = (made.get(module, {}).get(own) for module, own in (owner(part, first), owner(part, second)))
        return a is b if a is None or b is None else torch.equal(a, b)

    before = untie(ties, equal)
    try:
        yield
    finally:
        for part, said in before:
            say_of_ties(part, said)


def _parts(model: nn.Module) -> bool:
    return bool(adapted_layers(model) or whole_modules(model))


@cache
def _saving_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass by the same name, which is what libraries write into their configs."""
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "made_by": (_saving_class, kind)}
    return type(kind.__name__, (Saving, kind), members)
